"""The safety nets of the test suite themselves."""

import pytest
import torch


def test_fresh_memory_is_poisoned():
    assert torch.empty(64).isnan().all()


def test_shapes_are_checked_at_run_time():
    from torchgraft.experiments import pick_learning_rate

    with pytest.raises(Exception, match="grid"):
        pick_learning_rate(3, lambda lr: lr)


def test_shape_checks_can_be_lifted_for_tests_of_our_own_messages(without_shape_checks):
    from torchgraft.experiments import pick_learning_rate

    with pytest.raises(ValueError, match="grid is empty"):
        pick_learning_rate([], lambda lr: lr)

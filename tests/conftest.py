import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook

import tests.shapes  # noqa: F401  (the hook finds the checker as an attribute of an imported module)

install_import_hook("torchgraft", "tests.shapes.check")

import torch

torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fresh memory is NaN in every test: reading what was never written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def without_shape_checks():
    """For tests of our own error messages, which the shape checker would otherwise forestall."""
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", False)

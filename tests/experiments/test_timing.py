import pytest
import torch

from torchgraft.experiments.timing import Case, compare, peak_bytes, slope


def test_peak_counts_what_is_held_at_once_not_what_passes_by():
    def in_turn():
        for _ in range(10):
            torch.zeros(1000)

    def at_once():
        return [torch.zeros(1000) for _ in range(10)]

    kept = []
    assert 4000 <= peak_bytes(in_turn) < 9000
    assert peak_bytes(lambda: kept.append(at_once())) >= 40000


def test_compare_reports_the_ratio_of_ours_to_the_peer():
    a = torch.randn(400, 400)
    record = compare(Case({"n": 400}, ours=lambda: a @ a, peer=lambda: [a @ a for _ in range(8)], peer_name="eight"),
                     repeats=5, seconds=0.0)  # fmt: skip
    assert record["peer"] == "eight"
    assert record["repeats"] == 5
    assert record["ratio"] < 0.6
    low, high = record["ratio_spread"]
    assert low <= record["ratio"] <= high
    assert record["peak_bytes_ours"] >= 400 * 400 * 4


def test_a_slow_case_says_how_often():
    case = Case({"n": 1}, ours=lambda: None, peer=lambda: None, repeats=2)
    assert compare(case, repeats=5, seconds=0.0, memory=False)["repeats"] == 2


def test_a_case_may_forbid_the_profile():
    case = Case({"n": 1}, ours=lambda: None, peer=lambda: None, memory=False)
    assert compare(case, repeats=2, seconds=0.0)["peak_bytes_peer"] is None


def test_case_needs_work_or_a_way_to_make_it():
    with pytest.raises(ValueError, match="either"):
        Case({"n": 1})


def test_slope_of_a_power_law():
    assert slope([1, 2, 4, 8], [5, 20, 80, 320]) == pytest.approx(2)
    with pytest.raises(ValueError, match="same length"):
        slope([1, 2], [1])

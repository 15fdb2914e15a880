import numpy as np
import pytest
from scipy import stats

from torchgraft.experiments import Claim, Measurement
from torchgraft.experiments.statistics import bootstrap_interval, judge, share_interval, t_interval, verdict


def seeds(metric, *values):
    return {i: Measurement({metric: v}) for i, v in enumerate(values)}


def examples(metric, *values):
    return {0: Measurement({metric: float(np.mean(values))}, examples={metric: list(values)})}


def claim(**changes):
    settings = dict(text="t", metric="accuracy", arm="a", against="b", smallest_effect=1.0)
    return Claim(**(settings | changes))


def test_t_interval_equals_scipys_paired_test():
    a, b = np.array([3.1, 2.9, 4.2, 3.3]), np.array([2.0, 2.5, 2.2, 2.6])
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert t_interval(a - b) == pytest.approx((expected.low, expected.high))


def test_t_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = sum(low <= 2 <= high for low, high in (t_interval(rng.normal(2, 1, 3)) for _ in range(2000)))
    assert 0.935 < covered / 2000 < 0.965


def test_bootstrap_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    found = [bootstrap_interval(rng.binomial(1, 0.3, 120) - rng.binomial(1, 0.1, 120)) for _ in range(60)]
    assert sum(low <= 0.2 <= high for low, high in found) >= 52


def test_share_interval_ends_where_the_tails_hold_two_and_a_half_per_cent():
    low, high = share_interval(np.array([1.0] * 7 + [0.0] * 33))
    assert stats.binom.sf(6, 40, low) == pytest.approx(0.025)
    assert stats.binom.cdf(7, 40, high) == pytest.approx(0.025)
    assert share_interval(np.zeros(60)) == (0.0, pytest.approx(1 - 0.025 ** (1 / 60)))


def test_a_share_held_against_a_bound_has_the_exact_interval():
    few = {"a": examples("accuracy", *[1] * 2, *[0] * 123)}
    bound = claim(against=0.05, smallest_effect=0.0, direction="lower", factor=100)
    judged = judge(bound, few)
    low, high = share_interval(np.array([1.0] * 2 + [0.0] * 123))
    assert judged.interval == pytest.approx((5 - 100 * high, 5 - 100 * low))
    assert (judged.method, judged.verdict) == ("exact binomial, 95 %", "inconclusive")
    # an exact equality stays one, and values between 0 and 1 keep the bootstrap
    same = judge(claim(against=0.0, smallest_effect=0.0, direction="equal"), {"a": examples("accuracy", 0, 0, 0)})
    assert same.verdict == "supported"
    assert "bootstrap" in judge(bound, {"a": examples("accuracy", 0.5, 0.1, 0.0)}).method


def test_bootstrap_of_equal_values_is_that_value():
    assert bootstrap_interval(np.zeros(50)) == (0.0, 0.0)


@pytest.mark.parametrize("interval", [t_interval, bootstrap_interval, share_interval])
def test_one_value_has_no_interval(interval):
    assert interval(np.array([1.0])) is None


@pytest.mark.parametrize(
    ("interval", "effect", "direction", "expected"),
    [
        ((1.0, 2.0), 1.0, "higher", "supported"),
        ((0.9, 2.0), 1.0, "higher", "inconclusive"),
        ((-3.0, 0.99), 1.0, "higher", "not supported"),
        ((-3.0, -2.0), 0.0, "higher", "not supported"),
        ((0.0, 0.0), 0.0, "higher", "not supported"),
        ((-0.5, 0.5), 0.5, "equal", "supported"),
        ((0.0, 0.0), 0.0, "equal", "supported"),
        ((-0.6, 0.5), 0.5, "equal", "inconclusive"),
        ((0.6, 0.9), 0.5, "equal", "not supported"),
        ((-0.9, -0.6), 0.5, "equal", "not supported"),
        (None, 0.0, "higher", "inconclusive"),
    ],
)
def test_verdicts(interval, effect, direction, expected):
    assert verdict(interval, effect, direction) == expected


def test_differences_are_paired_over_seeds():
    judged = judge(claim(), {"a": seeds("accuracy", 12, 22, 32), "b": seeds("accuracy", 10, 20, 30)})
    assert judged.estimate == pytest.approx(2)
    assert judged.interval == pytest.approx((2, 2))
    assert (judged.verdict, judged.paired_over, judged.n) == ("supported", "seeds", 3)


def test_differences_are_paired_over_examples():
    judged = judge(
        claim(smallest_effect=0.5),
        {"a": examples("accuracy", *[1, 1, 1, 0] * 20), "b": examples("accuracy", *[0, 0, 0, 0] * 20)},
    )
    assert (judged.paired_over, judged.n, judged.verdict) == ("examples", 80, "supported")
    assert judged.estimate == 0.75


def test_lower_turns_the_sign_and_factor_scales():
    judged = judge(
        claim(direction="lower", factor=100, smallest_effect=5),
        {"a": seeds("accuracy", 0.1, 0.2), "b": seeds("accuracy", 0.2, 0.3)},
    )
    assert judged.estimate == pytest.approx(10)
    assert judged.verdict == "supported"


def test_a_fixed_value_can_be_claimed():
    judged = judge(claim(against=0.0, direction="equal", smallest_effect=0.0), {"a": examples("accuracy", *[0.0] * 30)})
    assert judged.verdict == "supported"
    broken = judge(
        claim(against=0.0, direction="equal", smallest_effect=0.0), {"a": examples("accuracy", *[0.0] * 25, *[1.0] * 5)}
    )
    assert broken.verdict != "supported"


@pytest.mark.parametrize(
    ("changes", "message"),
    [(dict(arm="c"), "'c'"), (dict(metric="loss"), "'loss'")],
)
def test_claims_about_what_was_not_measured(changes, message):
    with pytest.raises(ValueError, match=message):
        judge(claim(**changes), {"a": seeds("accuracy", 1, 2), "b": seeds("accuracy", 1, 2)})


def test_arms_that_cannot_be_paired():
    with pytest.raises(ValueError, match="different seeds"):
        judge(claim(), {"a": seeds("accuracy", 1, 2), "b": seeds("accuracy", 1)})
    with pytest.raises(ValueError, match="different numbers"):
        judge(claim(), {"a": examples("accuracy", 1, 0), "b": examples("accuracy", 1)})


def test_measurements_must_agree_with_themselves():
    with pytest.raises(ValueError, match="have mean"):
        Measurement({"accuracy": 0.9}, examples={"accuracy": [0.0, 1.0]})
    with pytest.raises(ValueError, match="x values"):
        Measurement({}, curves={"c": ([1.0], [1.0, 2.0])})


def test_claims_refuse_negative_effects():
    with pytest.raises(ValueError, match="smallest_effect"):
        claim(smallest_effect=-1)

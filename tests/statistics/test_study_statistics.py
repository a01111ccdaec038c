"""40,000 simulated studies with known differences, put through the very lines that judge a real one.

Hypotheses: under normal differences the plain interval covers the truth in 95 % of studies, and a family of
arms without any difference raises a false alarm in at most 5 %. With 40,000 studies the standard error of a
coverage is 0.11 %, so the bounds asked for (94.5 to 95.5 %, at most 5.3 %) lie 4.6 and 2.7 standard errors
away; the seeds are fixed. Smallest defect caught: 0.8 % of coverage. The saboteurs below (an unpaired test,
no adjustment, one degree of freedom too many) break a bound each.
"""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.special import stdtrit

from twodice.study import compare

STUDIES = 40_000
SHAPES = {
    "normal": lambda g, size: g.standard_normal(size),
    "heavy tails (t with 3 degrees of freedom)": lambda g, size: g.standard_t(3, size) / np.sqrt(3),
    "skewed (exponential)": lambda g, size: g.exponential(1.0, size) - 1,
}


def simulated(shape: str, truth: list[float], seeds: int, salt: int = 0) -> np.ndarray:
    """Differences (S, A, N): every arm and the baseline have own noise, and share that of the seed."""
    g = np.random.default_rng([20, seeds, len(truth), salt, *map(ord, shape)])
    draw = SHAPES[shape]
    shared = 5.0 * draw(g, (STUDIES, 1, seeds))
    baseline = shared + draw(g, (STUDIES, 1, seeds))
    arms = shared + draw(g, (STUDIES, len(truth), seeds)) + np.asarray(truth)[None, :, None]
    return arms - baseline


def coverage(low: np.ndarray, high: np.ndarray, truth: list[float]) -> np.ndarray:
    return ((low <= truth) & (truth <= high)).mean(axis=0)


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize("truth", [[0.0], [0.7], [0.0, -1.0, 2.5], [-1.0] * 5])
def test_plain_intervals_cover_the_truth_in_95_percent_of_studies(truth: list[float], seeds: int) -> None:
    found = compare.paired(simulated("normal", truth, seeds))
    covered = coverage(found.low_alone, found.high_alone, truth)
    assert np.all((covered > 0.945) & (covered < 0.955)), covered
    adjusted = coverage(found.low, found.high, truth)
    assert np.all(adjusted > 0.945), adjusted
    if len(truth) == 1:
        np.testing.assert_array_equal(found.low, found.low_alone)


@pytest.mark.parametrize("seeds", [2, 3, 5, 10])
@pytest.mark.parametrize("arms", [1, 3, 5])
def test_a_family_without_differences_raises_a_false_alarm_in_at_most_5_percent_of_studies(
    arms: int, seeds: int
) -> None:
    truth = [0.0] * arms
    found = compare.paired(simulated("normal", truth, seeds))
    alarms = (found.p_adjusted < compare.ALPHA).any(axis=-1).mean()
    assert alarms <= 0.053, alarms
    together = ((found.low <= 0) & (found.high >= 0)).all(axis=-1).mean()
    assert together >= 0.947, together


def test_arms_without_a_difference_are_safe_beside_arms_with_one() -> None:
    truth = [0.0, 0.0, 3.0]
    found = compare.paired(simulated("normal", truth, 5))
    assert (found.p_adjusted[:, :2] < compare.ALPHA).any(axis=-1).mean() <= 0.053
    assert (found.p_adjusted[:, 2] < compare.ALPHA).mean() > 0.6


@pytest.mark.parametrize("truth", [[0.0, 0.0, 0.0], [0.0, -1.0, 2.5], [1.5]])
def test_an_interval_leaves_out_zero_exactly_when_its_arm_is_judged_different(truth: list[float]) -> None:
    for shape in SHAPES:
        found = compare.paired(simulated(shape, truth, 5))
        excludes = (found.low > 0) | (found.high < 0)
        np.testing.assert_array_equal(excludes, found.p_adjusted < compare.ALPHA)
        assert np.all(found.high - found.low >= (found.high_alone - found.low_alone) * (1 - 1e-12))


def test_other_shapes_of_noise_are_reported_and_not_far_off() -> None:
    lines = []
    for shape in SHAPES:
        for seeds in (3, 5, 10):
            found = compare.paired(simulated(shape, [0.0, 1.0, 1.0], seeds))
            covered = coverage(found.low_alone, found.high_alone, [0.0, 1.0, 1.0])
            none = compare.paired(simulated(shape, [0.0] * 3, seeds))
            alarms = (none.p_adjusted < compare.ALPHA).any(axis=-1).mean()
            lines.append(
                f"{shape}, {seeds} seeds: coverage {100 * covered.mean():.1f} %, alarms {100 * alarms:.1f} %"
            )
            assert covered.min() > 0.93 and alarms < 0.06
    print("\n".join(lines))


def test_power_and_the_smallest_detectable_difference_agree_with_simulation() -> None:
    for seeds, arms in ((3, 1), (5, 3), (10, 3)):
        size = compare.smallest_detectable(seeds, arms)
        assert size is not None
        g = np.random.default_rng([4, seeds, arms])
        found = compare.paired(g.standard_normal((STUDIES, 1, seeds)) + size)
        hit = (found.p[:, 0] < compare.ALPHA / arms).mean()
        assert abs(hit - compare.POWER) < 0.02, (seeds, arms, hit)
        assert compare.power(size, 1.0, seeds, compare.ALPHA / arms) == pytest.approx(compare.POWER, abs=1e-9)


def test_more_seeds_are_enough_in_four_of_five_studies() -> None:
    more = compare.more_seeds(0.6, 1.0, 5, 0.05 / 3)
    assert more is not None
    g = np.random.default_rng(8)

    def hits(n: int) -> float:
        found = compare.paired(g.standard_normal((STUDIES, 1, n)) + 0.6)
        return float((found.p[:, 0] < 0.05 / 3).mean())

    assert hits(5 + more) > 0.79 > hits(4 + more) - 0.02


# ---- the saboteurs


def test_an_unpaired_test_would_be_rejected() -> None:
    # Against paired data an unpaired interval is far too wide: it covers nearly always and finds next to
    # nothing.
    g = np.random.default_rng(3)
    shared = 5 * g.standard_normal((STUDIES, 5))
    a, b = shared + g.standard_normal((STUDIES, 5)), shared + g.standard_normal((STUDIES, 5))
    half = stdtrit(8, 0.975) * np.sqrt((a.var(axis=-1, ddof=1) + b.var(axis=-1, ddof=1)) / 5)
    covered = (np.abs((a - b).mean(axis=-1)) <= half).mean()
    assert not 0.945 < covered < 0.955


def test_a_family_without_adjustment_would_be_rejected() -> None:
    found = compare.paired(simulated("normal", [0.0] * 3, 5))
    assert (found.p < compare.ALPHA).any(axis=-1).mean() > 0.053


@pytest.mark.parametrize("seeds", [3, 5])
def test_one_degree_of_freedom_too_many_would_be_rejected(seeds: int) -> None:
    found = compare.paired(simulated("normal", [0.7], seeds))
    half = stdtrit(seeds, 0.975) * found.sd / np.sqrt(seeds)
    covered = (np.abs(found.mean - 0.7) <= half).mean()
    assert not 0.945 < covered < 0.955, covered


# ---- against scipy


def test_one_study_agrees_with_scipy() -> None:
    g = np.random.default_rng(1)
    baseline = g.normal(3.4, 0.05, 6)
    arms = [baseline + g.normal(shift, 0.02, 6) for shift in (-0.05, 0.004, 0.02)]
    found = compare.compare(baseline.tolist(), [arm.tolist() for arm in arms])
    raw = []
    for arm, difference in zip(arms, found, strict=True):
        told = stats.ttest_rel(arm, baseline)
        inside = told.confidence_interval(0.95)
        raw.append(told.pvalue)
        assert difference.p == pytest.approx(told.pvalue, rel=1e-9)
        assert (difference.low_alone, difference.high_alone) == pytest.approx(
            (inside.low, inside.high), rel=1e-9
        )
        level = 1 - 0.05 * difference.p / difference.p_adjusted
        wide = told.confidence_interval(level)
        assert (difference.low, difference.high) == pytest.approx((wide.low, wide.high), rel=1e-9)
    order = np.argsort(raw)
    stepped = np.maximum.accumulate(np.asarray(raw)[order] * [3, 2, 1]).clip(max=1)
    assert [found[i].p_adjusted for i in order] == pytest.approx(stepped.tolist())


def test_the_power_agrees_with_scipy() -> None:
    for shift, n, alpha in ((0.5, 5, 0.05), (2.3, 5, 0.05 / 3), (0.1, 200, 0.05), (6.0, 3, 0.01)):
        bound, nc = stats.t.ppf(1 - alpha / 2, n - 1), shift * np.sqrt(n)
        want = stats.nct.sf(bound, n - 1, nc) + stats.nct.cdf(-bound, n - 1, nc)
        assert compare.power(shift, 1.0, n, alpha) == pytest.approx(want, abs=1e-6)

"""The statistics of a study: paired differences, Holm's adjustment, intervals that agree with the verdict.

Everything works on arrays of any leading shape, so that the tests put 40,000 simulated studies through the
same lines as a real one. Knows no records and no torch. Letters: S studies (any leading shape), A arms other
than the baseline, N seeds.

What covers what. The *plain* interval of a comparison is the paired t interval; under normal differences it
covers the truth in 95 % of studies, exactly. The *adjusted* interval is the t interval at the level 1 - 0.05
/ c at which Holm's step-down procedure tested this very comparison, c being ``p_adjusted / p``, in [1, A].
Hence it leaves out 0 if and only if ``p_adjusted < 0.05``; it is never narrower than the plain one, so it
covers its own truth in at least 95 % of studies; and where no arm differs from the baseline, all A of them
hold 0 together in at least 95 %. It is *not* a simultaneous region for differences other than 0: the one that
goes with Holm (Strassburger and Bretz 2008, Statistics in Medicine 27) ends at 0 for every arm that is found
different while another is not, and so would hide by how much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import nctdtr, stdtr, stdtrit

from twodice.errors import ConfigError, DataError
from twodice.study.schema import Difference, Estimate, Percent, Verdict
from twodice.study.words import brief

ALPHA = 0.05
#: "Would probably settle it": in four of five studies.
POWER = 0.8
MOST_MORE_SEEDS = 1000
# Below this share of the values themselves a spread is rounding, not chance: equal arms differ by nothing.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Paired:
    """Paired comparisons of any leading shape; every field is (..., A)."""

    mean: np.ndarray
    sd: np.ndarray
    p: np.ndarray
    p_adjusted: np.ndarray
    factor: np.ndarray
    low: np.ndarray
    high: np.ndarray
    low_alone: np.ndarray
    high_alone: np.ndarray


def holm(p: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Holm's step-down adjustment along the last axis.

    Parameters
    ----------
    p
        (..., A) p-values.

    Returns
    -------
    p_adjusted, factor : np.ndarray
        (..., A) each. ``p_adjusted = min(1, factor * p)``; `factor` is in [1, A].

    References
    ----------
    Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6
    (1979).
    """
    count = p.shape[-1]
    order = np.argsort(p, axis=-1, kind="stable")
    ranked = np.take_along_axis(p, order, axis=-1)
    weights = np.arange(count, 0, -1, dtype=np.float64)
    stepped = np.maximum.accumulate(ranked * weights, axis=-1)
    # p = 0 (no spread at all) keeps the factor of its rank.
    ratio = np.divide(stepped, ranked, out=np.broadcast_to(weights, ranked.shape).copy(), where=ranked > 0)
    back = np.argsort(order, axis=-1, kind="stable")
    adjusted = np.take_along_axis(np.minimum(stepped, 1.0), back, axis=-1)
    return adjusted, np.take_along_axis(ratio, back, axis=-1)


def paired(differences_SAN: np.ndarray, scale: float = 1.0, factor: np.ndarray | None = None) -> Paired:
    """Compare A arms with the baseline in each of S studies.

    Parameters
    ----------
    differences_SAN
        Arm minus baseline, paired by seed; at least two seeds.
    scale
        Typical size of the values that were subtracted; a spread below 1e-12 of it is rounding.
    factor
        (..., A) by which each p is adjusted; without it Holm's.
    """
    n = differences_SAN.shape[-1]
    if n < 2:
        raise ConfigError(f"a paired comparison needs at least 2 seeds; got {n}")
    mean = differences_SAN.mean(axis=-1)
    sd = differences_SAN.std(axis=-1, ddof=1)
    floor = _ROUNDING * scale
    mean = np.where(np.abs(mean) <= floor, 0.0, mean)
    sd = np.where(sd <= floor, 0.0, sd)
    error = sd / np.sqrt(n)
    # Without any spread a difference is certain and no difference is none: p is 0 or 1.
    ratio = np.divide(np.abs(mean), error, out=np.where(mean == 0, 0.0, np.inf), where=error > 0)
    p = 2 * stdtr(n - 1, -ratio)
    if factor is None:
        adjusted, factor = holm(p)
    else:
        adjusted = np.minimum(1.0, factor * p)
    half = half_width(n, ALPHA / factor) * error
    half_alone = half_width(n, ALPHA) * error
    return Paired(
        mean, sd, p, adjusted, factor, mean - half, mean + half, mean - half_alone, mean + half_alone
    )


def half_width(n: int, alpha: Any) -> Any:
    """Half the width of a t interval at level 1 - alpha from `n` values, in standard errors."""
    return stdtrit(n - 1, 1 - np.asarray(alpha) / 2)


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of some values (one per seed) and its own 95 % t interval, which is null for one value."""
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        raise DataError("a mean needs at least one value; got none")
    mean = float(array.mean())
    listed = [float(v) for v in array]
    if array.size < 2:
        return Estimate(mean=mean, low=None, high=None, values=listed)
    half = float(half_width(array.size, ALPHA) * array.std(ddof=1) / np.sqrt(array.size))
    return Estimate(mean=mean, low=mean - half, high=mean + half, values=listed)


def compare(baseline: Sequence[float], arms: Sequence[Sequence[float]]) -> list[Difference]:
    """Compare each arm with the baseline; all values are losses, in the same order of seeds.

    Raises
    ------
    ConfigError
        An arm does not have as many values as the baseline.
    """
    if not arms:
        return []
    if any(len(arm) != len(baseline) for arm in arms):
        raise ConfigError(
            f"each arm must have the baseline's {len(baseline)} seeds; got {[len(a) for a in arms]}"
        )
    base = np.asarray(baseline, dtype=np.float64)
    differences = np.asarray(arms, dtype=np.float64) - base
    per_cent = 100 / float(base.mean())
    if base.size < 2:
        return [_one_seed(float(row[0]), per_cent) for row in differences]
    found = paired(differences, float(np.abs(base).max()))
    return [_difference(found, i, differences[i], per_cent) for i in range(len(arms))]


def compare_pairs(
    pairs: Sequence[tuple[np.ndarray, np.ndarray, Difference | None]],
) -> list[Difference]:
    """Compare pairs of arms, each by its own losses, as one family of Holm's.

    Parameters
    ----------
    pairs
        The losses of the arm, those that they are held against (both (N,), in the same order of seeds), and
        how the same two were judged in another family, or None: the wider adjustment of the two is taken.
    """
    rows = [arm - against for arm, against, _ in pairs]
    per_cent = [100 / float(against.mean()) for _, against, _ in pairs]
    if not rows or rows[0].size < 2:
        return [_one_seed(float(row[0]), scale) for row, scale in zip(rows, per_cent, strict=True)]
    found = paired(np.stack(rows), max(float(np.abs(against).max()) for _, against, _ in pairs))
    factor = found.factor.copy()
    for i, (_, _, other) in enumerate(pairs):
        if other is not None and other.p and other.p_adjusted is not None and other.p_adjusted < 1:
            factor[i] = max(factor[i], other.p_adjusted / other.p)
        elif other is not None and other.p_adjusted is not None and other.low is not None:
            # p = 0, or an adjusted p cut at 1, keeps no factor: take over the whole judgement.
            factor[i] = max(factor[i], _factor_of(other, len(rows[i])))
    found = paired(np.stack(rows), max(float(np.abs(against).max()) for _, against, _ in pairs), factor)
    return [_difference(found, i, rows[i], per_cent[i]) for i in range(len(rows))]


def _factor_of(told: Difference, n: int) -> float:
    """The factor by which a comparison was adjusted, read off its interval; 1 without any spread."""
    sd = float(np.std(told.values, ddof=1))
    if told.high is None or told.low is None or told.high == told.low or sd == 0:
        return 1.0
    half = (told.high - told.low) / 2
    return float(ALPHA / (2 * stdtr(n - 1, -half / (sd / np.sqrt(n)))))


def _one_seed(value: float, per_cent: float) -> Difference:
    return Difference(
        mean=value, low=None, high=None, p=None, p_adjusted=None, more_seeds=None, low_alone=None,
        high_alone=None,
        values=[value], percent=Percent(mean=per_cent * value, low=None, high=None),
    )  # fmt: skip


def _difference(found: Paired, i: int, values: np.ndarray, per_cent: float) -> Difference:
    mean, low, high = float(found.mean[i]), float(found.low[i]), float(found.high[i])
    adjusted = float(found.p_adjusted[i])
    more: int | None = 0
    if adjusted >= ALPHA:
        more = more_seeds(abs(mean), float(found.sd[i]), len(values), ALPHA / float(found.factor[i]))
    return Difference(
        mean=mean,
        low=low,
        high=high,
        p=float(found.p[i]),
        p_adjusted=adjusted,
        more_seeds=more,
        low_alone=float(found.low_alone[i]),
        high_alone=float(found.high_alone[i]),
        values=[float(v) for v in values],
        percent=Percent(mean=per_cent * mean, low=per_cent * low, high=per_cent * high),
    )


def verdict(difference: Difference | None) -> Verdict:
    """What may be said of an arm: its loss is lower (helps), higher (hurts), or neither is shown."""
    if difference is None:
        return "baseline"
    if difference.p_adjusted is None or difference.p_adjusted >= ALPHA:
        return "cannot tell"
    return "helps" if difference.mean < 0 else "hurts"


def words(difference: Difference | None) -> str:
    """The verdict in words; the interval is the adjusted one and is read as its word is.

    ``helps by 3.1 % [2.2, 4.0]``, ``hurts by 3.1 % [2.2, 4.0]``, ``cannot tell: 0.2 % worse [0.6 better to
    0.9 worse]``. Numbers with a sign (`Percent`, the pictures) are the arm minus the baseline: a minus is
    better.
    """
    said = verdict(difference)
    if difference is None:
        return "the baseline"
    percent = difference.percent
    if difference.p is None or percent.low is None or percent.high is None:
        return f"cannot tell: {_by(percent.mean)} in one seed, which says nothing of chance; take at least 3"
    if said == "cannot tell":
        if difference.mean == 0 and percent.low == percent.high:
            return "cannot tell: no difference at all"
        more = difference.more_seeds
        need = f"more than {MOST_MORE_SEEDS} more seeds would be needed"
        if more is not None:
            need = f"very roughly {more} more {'seed' if more == 1 else 'seeds'} would tell"
        return f"cannot tell: {_by(percent.mean)} [{_side(percent.low)} to {_side(percent.high)}]; {need}"
    sign = -1 if said == "helps" else 1
    ends = sorted((sign * percent.low, sign * percent.high))
    return f"{said} by {brief(abs(percent.mean))} % [{brief(ends[0])}, {brief(ends[1])}]"


def _side(percent: float) -> str:
    """An end of an interval with its side in words, so that no sign has to be interpreted."""
    if percent == 0:
        return "0"
    return f"{brief(abs(percent))} {'better' if percent < 0 else 'worse'}"


def _by(percent: float) -> str:
    if percent == 0:
        return "no difference"
    return f"{brief(abs(percent))} % {'better' if percent < 0 else 'worse'}"


def power(difference: float, sd: float, n: int, alpha: float) -> float:
    """Chance that a two-sided paired t test at level `alpha` on `n` pairs finds a true difference.

    Parameters
    ----------
    difference, sd
        The true mean of the paired differences and their standard deviation, in the same unit.
    n
        Pairs, at least 2.
    """
    shift = abs(difference) / sd * np.sqrt(n)
    bound = float(half_width(n, alpha))
    # The far tail adds the wrong sign's rejections; scipy's series gives out for far shifts, where the power
    # is 1.
    if shift - bound > 30:
        return 1.0
    near = float(nctdtr(n - 1, shift, bound))
    far = float(nctdtr(n - 1, shift, -bound))
    return float(np.clip(1 - near + (far if np.isfinite(far) else 0.0), 0.0, 1.0))


def more_seeds(difference: float, sd: float, n: int, alpha: float) -> int | None:
    """How many seeds beyond `n` settle a comparison in four of five studies, if this is the truth.

    Returns
    -------
    int or None
        At least 1; None where there is no difference or more than 1000 would be needed.
    """
    if sd == 0 or difference == 0 or power(difference, sd, n + MOST_MORE_SEEDS, alpha) < POWER:
        return None
    low, high = n, n + MOST_MORE_SEEDS  # the power grows with the number of pairs
    while high - low > 1:
        middle = (low + high) // 2
        if power(difference, sd, middle, alpha) >= POWER:
            high = middle
        else:
            low = middle
    return high - n


def smallest_detectable(n: int, comparisons: int) -> float | None:
    """The true difference, in standard deviations of the paired difference, found in four of five studies.

    Holm's first step (level 0.05 / comparisons) is what it is planned with, the hardest to pass.

    Returns
    -------
    float or None
        None with fewer than two pairs, which detect nothing.
    """
    if n < 2 or comparisons < 1:
        return None
    alpha = ALPHA / comparisons
    low, high = 0.0, 1.0
    while power(high, 1.0, n, alpha) < POWER:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if power(middle, 1.0, n, alpha) < POWER else (low, middle)
    return high

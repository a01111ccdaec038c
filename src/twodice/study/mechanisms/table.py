"""From what each trial recorded to the block ``mechanisms``: means, and paired differences to the baseline.

Pure arithmetic on records; loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from twodice.study import compare
from twodice.study.effects import adjusted
from twodice.study.mechanisms.measures import MEASURES, Measure, other_domain
from twodice.study.mechanisms.schema import Mechanisms, Moved, OfArm, Row

Trials = Mapping[tuple[str, int], Mapping[str, Any]]


def mechanisms_of(
    trials: Trials, arms: Sequence[str], seeds: Sequence[int], baseline: str, sources: Sequence[str]
) -> Mechanisms | None:
    """Sum up what the trials recorded.

    Parameters
    ----------
    trials
        By arm and seed; one without ``mechanisms`` (of an older twodice) has none.
    arms, seeds
        Those of the report, in its order.
    baseline
        Its name.
    sources
        Names of the text trained on.

    Returns
    -------
    Mechanisms or None
        None where no measure of any arm was taken in all of its trials.
    """
    told = {
        (one.field, arm): values
        for one in MEASURES
        for arm in arms
        if (values := _values(trials, arm, seeds, one)) is not None
    }
    if not told:
        return None
    # Every difference of the page is one that could be shown by luck, so all of them are one family.
    pairs = [
        (one.field, arm)
        for one in MEASURES
        for arm in arms
        if one.is_compared and arm != baseline and (one.field, arm) in told and (one.field, baseline) in told
    ]
    paired_by = [
        (field, "training", [a - b for a, b in zip(told[field, arm], told[field, baseline], strict=True)])
        for field, arm in pairs
    ]
    moved = {
        pair: Moved(mean=effect.mean, low=effect.low, high=effect.high)
        for pair, effect in zip(pairs, adjusted(paired_by), strict=True)
    }
    rows = [
        Row(measure=one.field, arms=[_of_arm(told, moved, one.field, arm) for arm in arms])
        for one in MEASURES
        if any((one.field, arm) in told for arm in arms)
    ]
    return Mechanisms(comparisons=len(pairs), domain=other_domain(sources), rows=rows)


def _values(trials: Trials, arm: str, seeds: Sequence[int], one: Measure) -> list[float] | None:
    """A measure of an arm, one value a seed; None where a trial has none."""
    found = [trials[arm, seed].get("mechanisms", {}).get(one.field) for seed in seeds]
    return None if any(value is None for value in found) else [float(value) for value in found]


def _of_arm(
    told: Mapping[tuple[str, str], list[float]],
    moved: Mapping[tuple[str, str], Moved],
    field: str,
    arm: str,
) -> OfArm:
    values = told.get((field, arm))
    return OfArm(
        arm=arm,
        value=None if values is None else compare.estimate(values),
        difference=moved.get((field, arm)),
    )

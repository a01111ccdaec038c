"""How far each of the two dice moves each measure of the central table: paired differences over the four
corners.

Pure arithmetic on the cells of a report; knows no records and no page. Paired by training seed: the models
with and without dropout of one seed began alike, and greedy and drawn texts of one seed come from one model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from twodice.study.compare import ALPHA, half_width, holm, paired
from twodice.study.schema import Arm, Cross, Effect, Estimate, Measures, Sampling

#: What a model knows, measured on held-out text: no setting of the generation die can change it.
OF_THE_MODEL = ("validation_nats_per_token", "gap_nats_per_token")
OF_THE_TEXT = tuple(name for name, field in Measures.model_fields.items() if field.annotation is Estimate)


def effects(arms: Sequence[Arm], sampling: Sequence[Sampling], cross: Cross) -> list[Effect]:
    """The effects of both dice, measure by measure.

    Parameters
    ----------
    arms, sampling
        Those of the report.
    cross
        Names the four corners; without an arm with dropout only the generation die has effects.

    Returns
    -------
    list[Effect]
        Where a corner is missing or the seeds of two corners differ, the effect is left out.
    """
    by_name = {arm.name: arm for arm in arms}
    models = [name for name in (cross.without, cross.with_dropout) if name is not None]
    cells = {(cell.arm, cell.setting.name): cell.measures for cell in sampling}
    paired_by: list[tuple[str, str, list[float]]] = []
    verdict: list[Effect] = []
    if len(models) == 2 and all(name in by_name for name in models):
        without, with_dropout = (by_name[name] for name in models)
        if without.seeds == with_dropout.seeds:
            for field in OF_THE_MODEL:
                told = with_dropout.at_best.difference
                if field == OF_THE_MODEL[0] and told is not None:
                    # The verdict's own interval: one page must not say both "cannot tell" and "moves it".
                    verdict.append(
                        Effect(measure=field, die="training", mean=told.mean, low=told.low, high=told.high)
                    )
                    continue
                pair = (getattr(with_dropout.at_best, field), getattr(without.at_best, field))
                paired_by += _differences(field, "training", [pair])
    for field in OF_THE_TEXT:
        corner = {key: getattr(measures, field) for key, measures in cells.items()}
        settings = (cross.drawn, cross.greedy)
        if len(models) == 2:
            pairs = [(corner.get((models[1], s)), corner.get((models[0], s))) for s in settings]
            paired_by += _differences(field, "training", pairs)
        paired_by += _differences(
            field,
            "generation",
            [(corner.get((m, settings[0])), corner.get((m, settings[1]))) for m in models],
        )
    # Two dice are two questions: each has its own family.
    families = ([one for one in paired_by if one[1] == die] for die in ("training", "generation"))
    return verdict + [effect for family in families for effect in adjusted(family)]


def adjusted(paired_by: Sequence[tuple[str, str, list[float]]]) -> list[Effect]:
    """Intervals adjusted by Holm's method over all effects of one die, lest one of them be shown by luck.

    An effect of one seed has no interval: it claims nothing, so it is not counted.
    """
    alone = [paired(np.array([values])) if len(values) > 1 else None for _, _, values in paired_by]
    _, factors = holm(np.array([float(one.p[0]) for one in alone if one is not None]))
    factor_of = iter(factors)
    found = []
    for (measure, die, values), one in zip(paired_by, alone, strict=True):
        if one is None:
            mean, low, high = values[0], None, None
        else:
            mean, n = float(one.mean[0]), len(values)
            half = float(half_width(n, ALPHA / next(factor_of)) * one.sd[0] / n**0.5)
            low, high = mean - half, mean + half
        found.append(Effect(measure=measure, die=die, mean=mean, low=low, high=high))  # type: ignore[arg-type]
    return found


def _differences(
    measure: str, die: str, pairs: Sequence[tuple[Estimate | None, Estimate | None]]
) -> list[tuple[str, str, list[float]]]:
    """One difference for each training seed, averaged over the pairs; nothing where a corner is missing."""
    columns = []
    for more, less in pairs:
        if more is None or less is None or len(more.values) != len(less.values):
            return []
        columns.append([a - b for a, b in zip(more.values, less.values, strict=True)])
    if len({len(column) for column in columns}) != 1:
        return []
    return [(measure, die, [sum(row) / len(row) for row in zip(*columns, strict=True)])]

"""How far each of the two dice moves each measure of the central table: paired differences over the four
corners.

Pure arithmetic on the cells of a report; knows no records and no page. Paired by training seed: the models
with and without dropout of one seed began alike, and greedy and drawn texts of one seed come from one model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from twodice.study.compare import estimate, paired
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
    return verdict + [effect for family in families for effect in _adjusted(family)]


def _adjusted(paired_by: Sequence[tuple[str, str, list[float]]]) -> list[Effect]:
    """Intervals adjusted by Holm's method over all effects of one die, lest one of them be shown by luck."""
    seeds = len(paired_by[0][2]) if paired_by else 0
    if seeds < 2 or any(len(values) != seeds for _, _, values in paired_by):
        told = [(measure, die, estimate(values)) for measure, die, values in paired_by]
        return [Effect(measure=m, die=d, mean=e.mean, low=e.low, high=e.high) for m, d, e in told]  # type: ignore[arg-type]
    found = paired(np.array([values for _, _, values in paired_by]))
    return [
        Effect(
            measure=measure,
            die=die,  # type: ignore[arg-type]
            mean=float(found.mean[i]),
            low=float(found.low[i]),
            high=float(found.high[i]),
        )
        for i, (measure, die, _) in enumerate(paired_by)
    ]


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

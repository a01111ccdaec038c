"""What the central table says in words: which die is shown to move what, by the adjusted intervals alone.

Knows neither pages nor records; says no more than `effects` found.
"""

from __future__ import annotations

from twodice.study import plot_data
from twodice.study.schema import Effect, Report
from twodice.study.words import listed, signed, signed_interval


def effect_text(effect: Effect, kind: str) -> str:
    """``−54.2 points [−55.0, −53.4]``: a difference in the unit of its measure."""
    if kind == "share":
        low, high = (None if v is None else 100 * v for v in (effect.low, effect.high))
        value = f"{signed(100 * effect.mean, 'plain1')} points"
        bracket = signed_interval(low, high, "plain1")
    else:
        unit = {"nats": " nats", "count": " characters"}.get(kind, "")
        value, bracket = signed(effect.mean, kind) + unit, signed_interval(effect.low, effect.high, kind)
    return f"{value} {bracket}".rstrip()


def is_clear(effect: Effect) -> bool:
    """Whether the interval leaves out zero (or there is a difference and no seed-to-seed spread at all)."""
    return effect.low is not None and effect.high is not None and (effect.low > 0 or effect.high < 0)


def moved_by(report: Report, measure: str) -> tuple[int, ...]:
    """Which dice are shown to move `measure`: 1 the training die, 2 the generation die."""
    found = (
        []
        if report.cross is None
        else [e for e in report.cross.effects if e.measure == measure and is_clear(e)]
    )
    return tuple(sorted({"training": 1, "generation": 2}[e.die] for e in found))


def cross_sentence(report: Report, measure: str, kind: str) -> str:
    """One plain sentence: which die moves `measure`, by how much."""
    found = {
        e.die: e for e in (report.cross.effects if report.cross is not None else []) if e.measure == measure
    }
    training, generation = found.get("training"), found.get("generation")
    if measure.startswith(("validation_", "gap_")):
        if training is None:
            return "Sampling never changes it: it belongs to the model."
        moved = f"Only the training die can move it: {effect_text(training, kind)}."
        return (
            moved
            if is_clear(training)
            else f"Only the training die could, and it is not shown to: {effect_text(training, kind)}."
        )
    if generation is None:
        return ""
    g = effect_text(generation, kind)
    if training is None:
        return (
            f"The generation die moves it: {g}."
            if is_clear(generation)
            else f"The generation die is not shown to move it: {g}."
        )
    t = effect_text(training, kind)
    if is_clear(generation) and is_clear(training):
        return f"Both dice move it: generation {g}; training {t}."
    if is_clear(generation):
        return f"The generation die moves it: {g}. The training die is not shown to: {t}."
    if is_clear(training):
        return f"The training die moves it: {t}. The generation die is not shown to: {g}."
    return f"Neither die is shown to move it: generation {g}; training {t}."


def cross_summary(report: Report) -> str:
    """How far neither die replaces the other: which measures each alone is shown to move."""
    titles = {measure.field: measure.title.lower() for measure in plot_data.MEASURES}
    titles = {"validation_nats_per_token": "loss on unseen text", "gap_nats_per_token": "the gap", **titles}
    moved = {field: moved_by(report, field) for field in titles}
    training, generation = (
        [titles[field] for field, dice in moved.items() if dice == (die,)] for die in (1, 2)
    )
    if report.cross is None or report.cross.with_dropout is None:
        return ""
    if training and generation:
        return (
            "Neither die replaces the other here: only the training die is shown to move "
            f"{listed(training)}, only the generation die {listed(generation)}."
        )
    for alone, die, other in (
        (training, "training", "generation"),
        (generation, "generation", "training"),
    ):
        if alone:
            return f"Only the {die} die is shown to move {listed(alone)}; the {other} die alone, nothing."
    return ""

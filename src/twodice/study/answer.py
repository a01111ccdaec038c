"""The sentences of a report: the answer, what qualifies it, how it was measured. Each follows from a number.

Knows neither records nor pages; draws nothing, decides nothing that `compare` has not decided.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from twodice.study import schema
from twodice.study.spec import Settled, StudySpec
from twodice.study.words import brief, number
from twodice.training.config import FEW_EPOCHS

SO_FAR = "So far (not all trials are done): "


def _quoted(names: Sequence[str]) -> str:
    listed = [f"'{name}'" for name in names]
    return listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} and {listed[-1]}"


def answer_of(
    arms: Sequence[schema.Arm],
    baseline: str,
    contrasts: Sequence[schema.Contrast],
    *,
    is_complete: bool,
) -> str:
    """The answer in one sentence: first dropout, then what else was asked.

    Dropout is credited with what the contrasts show, which differ in it alone, and with nothing else.
    """
    lead = "" if is_complete else SO_FAR
    compared = [arm for arm in arms if arm.name != baseline]
    # Against a baseline that drops units itself, no difference says whether dropout helps.
    asks = not any(arm.has_dropout for arm in arms if arm.name == baseline)
    dropping = [arm for arm in compared if arm.has_dropout and asks]
    others = [arm for arm in compared if arm not in dropping]
    said = _of_dropout(dropping, contrasts, baseline) if dropping else _of_change(others, baseline)
    if dropping and others:
        said += "; without dropout, " + ", ".join(_of_other(arm, baseline) for arm in others)
    text = f"{lead}on this text {said}"
    return text[0].upper() + text[1:] + "."


def _lowest(arms: Sequence[schema.Arm]) -> schema.Arm:
    return min(arms, key=lambda arm: arm.at_best.validation_nats_per_token.mean)


def _of_dropout(dropping: Sequence[schema.Arm], contrasts: Sequence[schema.Contrast], baseline: str) -> str:
    """What may be said of dropout, given the arms that have it."""
    helping, hurting = ([c for c in contrasts if c.verdict == verdict] for verdict in ("helps", "hurts"))
    winners = [arm for arm in dropping if arm.verdict == "helps"]
    if helping:
        said = _of_contrasts(helping, baseline)
        if hurting:
            said += f"; but dropout {_of_contrasts(hurting, baseline).removeprefix('dropout ')}"
        best = _lowest(winners) if winners else None
        if best is not None and best.name not in {c.arm for c in helping}:
            said += f"; the arm '{best.name}' {best.words} against '{baseline}', {_share(best, contrasts)}"
        return said
    if winners:
        best = _lowest(winners)
        return f"the arm '{best.name}' {best.words} against '{baseline}'; {_share(best, contrasts)}"
    if contrasts and len(hurting) == len(contrasts):
        return _of_contrasts(hurting, baseline)
    if contrasts:
        by_name = {arm.name: arm for arm in dropping}
        unclear = [c for c in contrasts if c.verdict == "cannot tell"]
        nearest = min(unclear, key=lambda c: by_name[c.arm].at_best.validation_nats_per_token.mean)
        return (
            f"we cannot tell whether dropout helps: arm '{nearest.arm}'{_on_top(nearest, baseline)} "
            f"{_after_colon(nearest.words)}"
        )
    nearest_arm = _lowest(dropping)
    return (
        f"we cannot tell whether dropout helps, for no two arms differ in it alone: arm '{nearest_arm.name}' "
        f"{_after_colon(nearest_arm.words)}"
    )


def _of_contrasts(told: Sequence[schema.Contrast], baseline: str) -> str:
    """``dropout helps by ... against 'neither' (arm 'dropout') and helps by ... on top of ...``."""
    parts = []
    for one in told:
        against = f"against '{one.against}'" if one.against == baseline else f"on top of '{one.against}'"
        parts.append(f"{one.words} {against} (arm '{one.arm}')")
    return "dropout " + " and ".join(parts)


def _share(arm: schema.Arm, contrasts: Sequence[schema.Contrast]) -> str:
    """That what an arm gains is not shown to be dropout's, and by which contrast."""
    own = next((c for c in contrasts if c.arm == arm.name), None)
    if own is None:
        return "dropout's share in it is not shown, for no arm differs from it in dropout alone"
    if own.verdict == "hurts":
        return f"dropout's share in it is a loss: against '{own.against}' it {own.words}"
    return f"dropout's share in it is not shown (against '{own.against}': {_after_colon(own.words)})"


def _on_top(contrast: schema.Contrast, baseline: str) -> str:
    return "" if contrast.against == baseline else f" against '{contrast.against}'"


def _of_change(arms: Sequence[schema.Arm], baseline: str) -> str:
    """What may be said where nothing is asked of dropout."""
    helping = [arm for arm in arms if arm.verdict == "helps"]
    hurting = [arm for arm in arms if arm.verdict == "hurts"]
    if helping or len(hurting) == len(arms):
        best = _lowest(helping if helping else hurting)
        return f"the change {best.words} against '{baseline}' (arm '{best.name}')"
    nearest = _lowest([arm for arm in arms if arm.verdict == "cannot tell"])
    return f"we cannot tell whether any change helps: arm '{nearest.name}' {_after_colon(nearest.words)}"


def _of_other(arm: schema.Arm, baseline: str) -> str:
    if arm.verdict == "cannot tell":
        return f"'{arm.name}' cannot be told from '{baseline}' ({_after_colon(arm.words)})"
    return f"'{arm.name}' {arm.words}"


def _sentence(words: str) -> str:
    """Begin with a capital, but for the name of a program."""
    return words if words.startswith("xz") else words[0].upper() + words[1:]


def _after_colon(words: str) -> str:
    return words.removeprefix("cannot tell: ")


def details_of(report: schema.Report) -> list[str]:
    """What qualifies the answer."""
    found = []
    instead = {"cannot tell": "does as well, as far as this study can tell", "hurts": "does better"}
    for told, does in instead.items():
        end = [arm.name for arm in report.arms if arm.only_at_end and arm.verdict == told]
        if end:
            found.append(
                f"{_quoted(end)} {'wins' if len(end) == 1 else 'win'} at the end of training only: stopping '"
                f"{report.baseline}' at its best step {does}."
            )
    worse = [a.name for a in report.arms if a.at_end.verdict == "hurts" and a.at_best.verdict != "hurts"]
    if worse:
        found.append(
            f"{_quoted(worse)} {'is' if len(worse) == 1 else 'are'} worse at the end of training only."
        )
    base = next(arm for arm in report.arms if arm.name == report.baseline)
    rise, gap = base.overfits_percent, number(base.at_end.gap_nats_per_token.mean, "plain")
    if rise >= 1:
        found.append(
            f"'{base.name}' overfits: its loss on unseen text ends {brief(rise)} % above its best, {gap} "
            "nats per token above its loss on the training text."
        )
    else:
        read = passes(report.steps, report.model, report.data)
        times = f"{number(read, 'count')} times"
        found.append(
            f"'{base.name}' does not overfit in {report.steps} steps: its loss on unseen text ends "
            f"{brief(abs(rise))} % {'above' if rise >= 0 else 'below'} its best (gap {gap} nats per token). "
            + (
                f"The training text was read about {times}; dropout is for texts that are read many times."
                if read <= FEW_EPOCHS
                else f"That is so although the training text was read about {times}."
            )
        )
        losses = [loss.mean for loss in base.curve.validation_nats_per_token]
        if losses and losses[-1] == min(losses):
            found.append(
                f"'{base.name}' was still improving at its last step: after more steps the answer may be "
                "another."
            )
    bits = base.at_best.validation_bits_per_byte.mean
    for line in report.sanity:
        if line.unit == "bits per byte":
            found.append(f"{_sentence(line.words)}; '{base.name}' needs {bits:.2f} at its best step.")
    missing = [
        name
        for name in (report.cross.arms if report.cross is not None else ())
        if name not in {cell.arm for cell in report.sampling}
    ]
    if missing and report.is_complete:
        found.append(
            f"Texts of {_quoted(missing)} are missing: the same twodice study command generates them."
        )
    if len(report.seeds) == 1:
        found.append("One seed cannot separate an effect from chance: no interval and no verdict is given.")
    return found


def passes(steps: int, model: schema.Model, data: schema.Facts) -> float:
    """How often the training text is read."""
    return steps * model.batch * model.context / max(1, data.train_tokens)


def plan_words(pairs: int, comparisons: int, smallest: float | None, sd_percent: float | None) -> str:
    """What so many pairs can detect, with the assumption under which it is said in percent."""
    if smallest is None:
        return f"{pairs} pair detects nothing: chance cannot be seen in one seed"
    many = "one comparison" if comparisons == 1 else f"{comparisons} comparisons"
    text = (
        f"{pairs} pairs find a true difference of {smallest:.1f} standard deviations of the paired "
        f"difference in "
        f"4 of 5 studies ({many}, the first step of Holm's test)"
    )
    if sd_percent is not None:
        text += (
            f"; with the {sd_percent:.2f} % of the loss measured here that is {smallest * sd_percent:.1f} %"
        )
    return text


def _windows_words(windows: int, scored: schema.Scored | None) -> str:
    """Over how much text the losses are means."""
    said = f"Losses are means over the same windows for all arms and seeds, in eval mode: at most {windows} "
    if scored is None:
        return said + "of each part."
    share = 100 * scored.windows / max(1, scored.there)
    how_much = (
        f"all {scored.there} windows of it"
        if scored.windows == scored.there
        else f"{scored.windows} of its {scored.there} windows, spread evenly ({brief(share)} % of it)"
    )
    return (
        f"{said}of each part for the curves, for the choice of the best step and for the loss on the "
        f"training text. The losses on validation text B at the best step and at the end, which are what is "
        f"compared, are means over {how_much}."
    )


def notes_of(
    spec: StudySpec, settled: Settled, study: Mapping[str, Any], scored: schema.Scored | None
) -> list[str]:
    """How everything was measured."""
    context, data, batch = study["model"]["context"], study["data"], study["model"]["batch"]
    read = passes(
        settled.steps, schema.Model.model_validate(study["model"]), schema.Facts.model_validate(data)
    )
    notes = [
        (
            "All trials of one seed share initial weights, the order of the batches and nested masks of "
            "dropout: "
            "what is dropped at a lower rate is dropped at a higher one too."
        ),
        (
            f"Every trial took {settled.steps} steps of {batch} windows of {context} tokens, about "
            f"{number(read, 'count')} "
            f"passes over the training text; the number of steps is {settled.reason}."
        ),
        (
            "At best: the step with the lowest loss on validation text A. At the end: the last step. All "
            "losses on "
            "unseen text that are shown and compared are those of validation text B, on which no step and no "
            "setting was chosen; only which arm is called the best is decided there, among those that help."
        ),
        _windows_words(spec.base.evaluation.windows, scored),
        (
            "Differences are paired by seed. Their intervals are t intervals at the level at which Holm's "
            "step-down "
            "test judged that arm: an interval leaves out 0 exactly when the adjusted p is below 0.05. In "
            "percent: "
            "relative to the baseline's mean loss. Intervals of single losses and of the measures of texts "
            "are plain "
            "95 % t intervals over the seeds."
        ),
    ]
    if data["crosses_documents"]:
        notes.append("Training windows may cross from one document to the next.")
    if spec.tune:
        values = "; ".join(f"{name} from {', '.join(options)}" for name, options in spec.tune.items())
        notes.append(
            f"Tuned for each arm with equal effort, on validation text A and seed {spec.tuning_seed}, which "
            f"is not "
            f"among the study's: {values}."
        )
    else:
        lr = study["lr"]
        notes.append(f"The learning rate ({lr:g}) was not tuned for each arm; --tune lr=... does that.")
    return notes

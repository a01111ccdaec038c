"""From ``records.jsonl`` to ``report.json``: every number and every sentence. Knows no torch and no clock.

The same records, in any order, give the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import twodice
from twodice.errors import DataError
from twodice.study import compare, schema
from twodice.study.answer import answer_of, details_of, notes_of, plan_words
from twodice.study.arms import Arm
from twodice.study.contrasts import beyond_dropout, dropout_contrasts
from twodice.study.effects import effects
from twodice.study.mechanisms.table import mechanisms_of
from twodice.study.records import RECORDS, Record, in_order, read_records
from twodice.study.sampling_cross import settings_of
from twodice.study.spec import Settled, StudySpec, flat

REPORT = "report.json"
_LOSSES = ("train_nats_per_token", "validation_b_nats_per_token", "validation_b_bits_per_byte")


@dataclass(frozen=True)
class Found:
    """The records of a study, sorted into what they are about."""

    spec: StudySpec
    settled: Settled
    arms: list[Arm]
    study: Record
    trials: dict[tuple[str, int], Record]
    tuning: list[Record]
    other: list[Record]

    @property
    def seeds(self) -> list[int]:
        """The seeds of which every arm has its trial."""
        return [s for s in self.spec.seed_list if all((arm.name, s) in self.trials for arm in self.arms)]

    def tuned(self, arm: str) -> dict[str, str]:
        """The values that validation A chose for an arm; empty without tuning. The first of equals."""
        tried = [record for record in self.tuning if record["arm"] == arm]
        if not tried:
            return {}
        order = [dict(values) for values in self.spec.tunings()]
        tried.sort(key=lambda record: order.index(record["values"]))
        values: dict[str, str] = min(tried, key=lambda r: float(r["validation_a_nats_per_token"]))["values"]
        return values


def sort_records(records: Sequence[Record]) -> Found:
    """Sort the records.

    Raises
    ------
    DataError
        The study's own record is missing.
    """
    records = in_order(records)
    study = next((record for record in records if record["kind"] == "study"), None)
    if study is None:
        raise DataError("the records of a study begin with what was asked for; that record is missing")
    spec = StudySpec.model_validate(study["spec"])
    return Found(
        spec=spec,
        settled=Settled.model_validate(study["settled"]),
        arms=spec.parsed_arms(),
        study=study,
        trials={(r["arm"], int(r["seed"])): r for r in records if r["kind"] == "trial"},
        tuning=[r for r in records if r["kind"] == "tuning"],
        other=[r for r in records if r["kind"] not in ("study", "trial", "tuning")],
    )


def summarise(records: Sequence[Record]) -> schema.Report:
    """Everything that the report says.

    Raises
    ------
    DataError
        No seed is complete yet.
    """
    found = sort_records(records)
    spec, seeds = found.spec, found.seeds
    if not seeds:
        raise DataError(
            f"a report needs at least one seed with a trial of each of the {len(found.arms)} arms; "
            f"{len(found.trials)} trials are recorded: go on with the same twodice study command"
        )
    baseline = spec.baseline
    others = [arm.name for arm in found.arms if arm.name != baseline]
    at_best, at_end = (_comparisons(found, seeds, baseline, others, when) for when in ("best", "end"))
    arms = [_arm(found, arm, seeds, at_best[arm.name], at_end[arm.name]) for arm in found.arms]
    contrasts = dropout_contrasts(arms, baseline)
    best = choose_best(arms, baseline)
    best_seed = choose_seed(found, best, seeds)
    cells = _sampling(found, seeds)
    cross = _cross(found, arms, baseline, best, cells)
    human = next((r for r in found.other if r["kind"] == "human"), None)
    sanity = next((r for r in found.other if r["kind"] == "sanity"), None)
    smallest = compare.smallest_detectable(spec.seeds, len(others))
    report = schema.Report(
        twodice=found.study["twodice"],
        answer=answer_of(arms, baseline, contrasts, is_complete=len(seeds) == spec.seeds),
        details=[],
        data=schema.Facts.model_validate(found.study["data"]),
        model=schema.Model.model_validate(found.study["model"]),
        baseline=baseline,
        best=best,
        best_seed=best_seed,
        best_step=int(found.trials[best, best_seed]["best_step"]),
        steps=found.settled.steps,
        seeds=seeds,
        is_complete=len(seeds) == spec.seeds,
        arms=arms,
        scored_on=(scored := scored_on(found, seeds)),
        dropout_contrasts=contrasts,
        mechanisms=mechanisms_of(
            found.trials, [arm.name for arm in arms], seeds, baseline, found.study["data"]["sources"]
        ),
        sampling=cells,
        human=None if human is None else schema.HumanText.model_validate(human["measures"]),
        cross=cross,
        examples=_examples(found, arms, human),
        sanity=[] if sanity is None else [schema.Sanity.model_validate(item) for item in sanity["items"]],
        plan=schema.Plan(
            pairs=spec.seeds,
            smallest_difference_in_sd=smallest,
            words=plan_words(spec.seeds, len(others), smallest, measured_sd_percent(arms)),
        ),
        how=schema.How(
            notes=notes_of(spec, found.settled, found.study, scored),
            settings=_shared_settings(found),
            commands=dict(found.study["commands"]),
            machine=dict(found.study["machine"]),
            case=spec.case,
        ),
    )
    return report.model_copy(update={"details": details_of(report)})


def _shared_settings(found: Found) -> dict[str, Any]:
    """What all arms start from, by dotted name, as settled; what is absent follows from the model."""
    settings = {**flat(found.spec.base.model_dump(mode="json")), "steps": found.settled.steps}
    model, every = found.study["model"], found.settled.evaluate_every
    derived = {"optimizer.lr": found.study["lr"], "batch": model["batch"], "context": model["context"]}
    derived |= {"evaluation.every": every, "threads": found.settled.threads}
    for name, value in derived.items():
        if settings[name] is None:
            settings[name] = value
    # The seeds are each arm's; when a trial saves changes nothing that it finds.
    told = {name for name in settings if name != "seed" and not name.startswith("checkpoint.")}
    return {name: value for name, value in settings.items() if value is not None and name in told}


def _moments(record: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The evaluations of a trial at its best step (by validation A) and at the end."""
    evaluations = record["evaluations"]
    best = min(evaluations, key=lambda e: (e["validation_a_nats_per_token"], e["step"]))
    return best, evaluations[-1]


def scored_on(found: Found, seeds: Sequence[int]) -> schema.Scored | None:
    """How much of validation text B every trial was scored on; None where one was not, or by another measure.

    Losses over different windows must not be compared, so one trial without (of an older twodice, or one
    whose checkpoint was lost) takes all back to the windows of the evaluations.
    """
    told = {
        (b["windows"], b["there"]) if (b := found.trials[arm.name, seed].get("validation_b")) else None
        for arm in found.arms
        for seed in seeds
    }
    if len(told) != 1 or (one := told.pop()) is None:
        return None
    return schema.Scored(windows=one[0], there=one[1])


def _looked_at(record: Mapping[str, Any], when: str, *, on_b: bool) -> dict[str, Any]:
    """The losses of a trial at one moment; those on validation B over all that was scored of it."""
    moment = _moments(record)[0 if when == "best" else 1]
    if not on_b:
        return moment
    told = record["validation_b"][when]
    return {**moment, **{f"validation_b_{name}": value for name, value in told.items()}}


def _comparisons(
    found: Found, seeds: Sequence[int], baseline: str, others: Sequence[str], when: str
) -> dict[str, schema.Comparison]:
    on_b = scored_on(found, seeds) is not None
    looked_at = {
        name: [_looked_at(found.trials[name, seed], when, on_b=on_b) for seed in seeds]
        for name in (baseline, *others)
    }
    losses = {name: [e["validation_b_nats_per_token"] for e in at] for name, at in looked_at.items()}
    differences: dict[str, schema.Difference | None] = {baseline: None}
    told = compare.compare(losses[baseline], [losses[name] for name in others])
    differences.update(dict(zip(others, told, strict=True)))
    result = {}
    for name, at in looked_at.items():
        train, validation, bits = ([e[key] for e in at] for key in _LOSSES)
        result[name] = schema.Comparison(
            steps=[int(e["step"]) for e in at],
            train_nats_per_token=compare.estimate(train),
            validation_nats_per_token=compare.estimate(validation),
            validation_bits_per_byte=compare.estimate(bits),
            gap_nats_per_token=compare.estimate([v - t for t, v in zip(train, validation, strict=True)]),
            difference=differences[name],
            verdict=compare.verdict(differences[name]),
        )
    return result


def _arm(
    found: Found, arm: Arm, seeds: Sequence[int], best: schema.Comparison, end: schema.Comparison
) -> schema.Arm:
    rows = [found.trials[arm.name, seed]["evaluations"] for seed in seeds]
    steps = [int(e["step"]) for e in rows[0]]

    def curve(key: str) -> list[schema.Estimate]:
        return [compare.estimate([row[i][key] for row in rows]) for i in range(len(steps))]

    lowest, last = best.validation_nats_per_token.mean, end.validation_nats_per_token.mean
    return schema.Arm(
        name=arm.name,
        settings=arm.changes(),
        text=arm.text,
        seeds=list(seeds),
        has_dropout=arm.has_dropout(found.spec.base),
        at_best=best,
        at_end=end,
        verdict=best.verdict,
        words=compare.words(best.difference),
        words_at_end=compare.words(end.difference),
        only_at_end=end.verdict == "helps" and best.verdict != "helps",
        overfits_percent=100 * (last / lowest - 1),
        curve=schema.Curve(
            steps=steps,
            train_nats_per_token=curve("train_nats_per_token"),
            validation_nats_per_token=curve("validation_b_nats_per_token"),
        ),
        tuned=found.tuned(arm.name),
    )


def choose_best(arms: Sequence[schema.Arm], baseline: str) -> str:
    """The arm that helps and has the lowest mean loss; the baseline where none helps."""
    helping = [arm for arm in arms if arm.verdict == "helps"]
    if not helping:
        return baseline
    return min(helping, key=lambda arm: arm.at_best.validation_nats_per_token.mean).name


def choose_seed(found: Found, arm: str, seeds: Sequence[int]) -> int:
    """Of the trials of an arm the one with the lowest loss on validation A; the first of equals."""
    return min(seeds, key=lambda s: float(_moments(found.trials[arm, s])[0]["validation_a_nats_per_token"]))


def choose_cross(arms: Sequence[schema.Arm], baseline: str, best: str) -> tuple[list[str], str | None, str]:
    """Which arms generate, which of them is "with dropout", and why these.

    Returns
    -------
    names, with_dropout, reason
        The baseline, the best arm, and the best arm that differs from the baseline in dropout alone (where
        there is none, the best one with dropout).
    """
    by_name = {arm.name: arm for arm in arms}
    dropping = [arm for arm in arms if arm.has_dropout and arm.name != baseline]
    names = [baseline] + ([best] if best != baseline else [])
    if by_name[baseline].has_dropout:
        return names, None, f"'{baseline}' has dropout itself, so there is no model without to cross"
    if not dropping:
        return names, None, "no arm has dropout"

    def differs(arm: schema.Arm) -> list[str]:
        return beyond_dropout(arm, by_name[baseline])

    # What the corners show is credited to the training die, so an arm that changes dropout alone comes first.
    alone = [arm for arm in dropping if not differs(arm)]
    chosen = min(alone or dropping, key=lambda arm: arm.at_best.validation_nats_per_token.mean)
    if chosen.name not in names:
        names.append(chosen.name)
    if alone:
        lowest = " with the lowest mean loss" if len(alone) > 1 else ""
        why = f"'{chosen.name}' is the arm{lowest} that differs from '{baseline}' in dropout alone"
    else:
        why = (
            f"no arm differs from '{baseline}' in dropout alone; '{chosen.name}' has the lowest mean loss of "
            f"those with dropout and differs in {' and '.join(differs(chosen))} too"
        )
    if chosen.tuned != by_name[baseline].tuned:
        why += f"; {' and '.join(chosen.tuned)} was tuned for each"
    return names, chosen.name, why


def measured_sd_percent(arms: Sequence[schema.Arm]) -> float | None:
    """Typical SD of the paired differences, in percent of the baseline's loss; None with one seed."""
    spreads = []
    for arm in arms:
        told = arm.at_best.difference
        if told is not None and len(told.values) > 1:
            mean = sum(told.values) / len(told.values)
            variance = sum((v - mean) ** 2 for v in told.values) / (len(told.values) - 1)
            base = next(a for a in arms if a.at_best.difference is None)
            spreads.append(100 * variance**0.5 / base.at_best.validation_nats_per_token.mean)
    return sorted(spreads)[len(spreads) // 2] if spreads else None


def _sampling(found: Found, seeds: Sequence[int]) -> list[schema.Sampling]:
    if found.spec.sampling is None:
        return []
    by_cell: dict[tuple[str, str], dict[int, Record]] = {}
    for record in found.other:
        if record["kind"] == "sampling" and record["seed"] in seeds:
            key = (record["arm"], record["setting"]["name"])
            by_cell.setdefault(key, {})[record["seed"]] = record
    cells = []
    settings = settings_of(found.spec.sampling.top_k, found.spec.sampling.temperature)
    for arm in found.arms:
        for setting in settings:
            records = by_cell.get((arm.name, setting.name), {})
            if len(records) < len(seeds):
                continue
            rows = [records[seed] for seed in seeds]

            def over(key: str, rows: list[Record] = rows) -> schema.Estimate:
                return compare.estimate([sum(d[key] for d in r["draws"]) / len(r["draws"]) for r in rows])

            fields = [
                name
                for name, field in schema.Measures.model_fields.items()
                if field.annotation is schema.Estimate
            ]
            cells.append(
                schema.Sampling(
                    arm=arm.name,
                    setting=setting,
                    texts=sum(row["texts"] * len(row["draws"]) for row in rows),
                    measures=schema.Measures(
                        **{name: over(name) for name in fields},
                        longest_copied_most=max(row["longest_copied_most"] for row in rows),
                    ),
                )
            )
    return cells


def _cross(
    found: Found, arms: Sequence[schema.Arm], baseline: str, best: str, cells: Sequence[schema.Sampling]
) -> schema.Cross | None:
    plan = found.study.get("sampling")
    if plan is None or not cells:
        return None
    names, chosen, why = choose_cross(arms, baseline, best)
    by_name = {arm.name: arm for arm in arms}
    drawn = [cell.setting for cell in cells if not cell.setting.greedy]
    # The middle of the grid's k at temperature 1, or what is nearest to it.
    usual = next((s for s in drawn if s.temperature == 1 and s.top_k == 50), None)
    if usual is None:
        usual = next((s for s in drawn if s.temperature == 1 and s.top_k is not None), drawn[-1])
    cross = schema.Cross(
        without=baseline,
        with_dropout=chosen,
        differs_in=[] if chosen is None else beyond_dropout(by_name[chosen], by_name[baseline]),
        greedy="greedy",
        drawn=usual.name,
        arms=names,
        reason=why,
        prompts=plan["prompts"],
        prompt_tokens=plan["prompt_tokens"],
        tokens=plan["tokens"],
        sampling_seeds=list(range(plan["draws"])),
        effects=[],
    )
    return cross.model_copy(update={"effects": effects(arms, cells, cross)})


def _examples(found: Found, arms: Sequence[schema.Arm], human: Record | None) -> list[schema.Example]:
    order = {arm.name: i for i, arm in enumerate(arms)}
    records = [r for r in found.other if r["kind"] == "example"]
    told = [
        _example(r, r["arm"], r["seed"], r["draw"])
        for r in sorted(records, key=lambda r: (r["number"], order[r["arm"]], r["setting"]))
    ]
    return told + [_example(r, "human", None, None) for r in (human["examples"] if human is not None else ())]


def _example(
    record: Record, arm: str, training_seed: int | None, sampling_seed: int | None
) -> schema.Example:
    fields = ("prompt", "setting", "text", "rep_4", "longest_copied_characters", "copied_from")
    return schema.Example(
        arm=arm,
        training_seed=training_seed,
        sampling_seed=sampling_seed,
        **{field: record[field] for field in fields},
    )


def _of_records(folder: Path) -> schema.Report:
    """What a folder's records say; records that are damaged, or another version's, are one clear error."""
    try:
        return summarise(read_records(folder))
    except ValidationError as error:
        first = error.errors()[0]
        fault = f"{error.title} {'.'.join(map(str, first['loc']))} is missing or not of its kind"
    except KeyError as error:
        fault = f"{error} is missing in one"
    raise DataError(
        f"{folder / RECORDS} must hold records that twodice {twodice.__version__} can read; {fault}"
    )


def write_summary(folder: Path) -> schema.Report:
    """Make ``report.json`` of a study's folder from its records, whole or not at all; return what it says."""
    report = _of_records(folder)
    side = folder / f".{REPORT}.new"
    try:
        with open(side, "w", encoding="utf-8", newline="\n") as file:
            file.write(report.as_json())
            file.flush()
            os.fsync(file.fileno())
        side.replace(folder / REPORT)
    except OSError as error:
        raise DataError(
            f"{folder} must be a folder that can be written; the system says: {error.strerror}"
        ) from None
    return report


def earlier_sd_percent(folder: Path) -> float | None:
    """`measured_sd_percent` of the study that is in `folder`; None where there is none that is far enough."""
    try:
        return measured_sd_percent(_of_records(folder).arms)
    except DataError:
        return None

"""A study, from top to bottom: settle, tune, train every trial, throw the second die, write what was found.

Does not import torch: the workers of `pool` do the work, this process keeps the records. Whatever is recorded
is never done again, so a study that was stopped or killed goes on where it was.
"""

from __future__ import annotations

import math
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import twodice
from twodice.errors import ConfigError
from twodice.study import schema, summary
from twodice.study.arms import Arm
from twodice.study.best import BEST, put_best, take_back
from twodice.study.pool import Job, Pool
from twodice.study.records import Recorder
from twodice.study.sampling_cross import settings_of
from twodice.study.spec import B_WINDOWS, Settled, StudySpec, differences, read_spec, write_spec
from twodice.training.config import TrainConfig, with_setting

TEXT, TRIALS, TUNING = "text", "trials", "tuning"
_EVALUATIONS, _FEWEST_EVALUATIONS, _FEWEST_STEPS = 20, 10, 20
_REHEARSAL_STEPS = 6
_MOST_WORKERS = 8
_CHECKPOINT_S = 20.0
#: Kept back from the minutes for the second die and the report: a tenth, within these bounds [s].
_RESERVE_S = (8.0, 60.0)
_SHOWN_PROMPTS = 4


class Bar(Protocol):
    """What shows the progress."""

    def update(self, done: int, note: str = "") -> None: ...
    def say(self, text: str) -> None: ...


@dataclass
class Study:
    """A study that is under way in a folder."""

    spec: StudySpec
    out: Path
    pool: Pool
    log: Recorder
    say: Callable[[str], None]
    bar: Callable[[str, int, int], Any]
    began: float

    @property
    def text(self) -> str:
        """Folder of the store of tokens."""
        return str(self.out / TEXT)


def run_study(
    spec: StudySpec,
    out: Path,
    *,
    command: str,
    stop: Callable[[], bool],
    say: Callable[[str], None],
    bar: Callable[[str, int, int], Any],
) -> schema.Report:
    """Run a study in `out`, or go on with the one that is there.

    Parameters
    ----------
    spec
        What is asked.
    out
        The study's folder.
    command
        As it was typed, for the report.
    stop
        Polled; once true the running trials save and `Interrupted` is raised.
    say
        Is told what happens, a line at a time.
    bar
        ``bar(title, total, done)`` gives a context manager that shows progress.

    Raises
    ------
    ConfigError
        `out` holds another study (the difference is shown), or the time is too short.
    Interrupted
        `stop` became true; the same call goes on from there.
    TwodiceError
        A trial failed.
    """
    before = read_spec(out)
    if before is not None and (changed := differences(before[0], spec)):
        raise ConfigError(
            f"{out} holds another study ({'; '.join(changed)}); ask for the same to go on with it, or give "
            f"another --out"
        )
    arms = spec.parsed_arms()
    trials = len(arms) * (spec.seeds + len(spec.tunings()))
    began = time.monotonic()
    log = Recorder(out)
    try:
        take_back(out)
        workers = before[1].workers if before is not None else max(w for w, _ in _layouts(spec, trials))
        with Pool(workers, stop=stop, say=say) as pool:
            study = Study(spec, out, pool, log, say, bar, began)
            facts = _prepare(study, begun=before is not None)
            if before is not None:
                settled = before[1]
                say(f"going on with the study in {out}: {_done(log)} of {trials} trials are done")
            else:
                settled = settle(study, arms, trials)
                write_spec(out, spec, settled)
            log.write(_study_record(spec, settled, facts, command, out))
            say(f"{trials} trials of {settled.steps} steps, {settled.workers} side by side: {settled.reason}")
            _tune(study, arms, settled)
            _train(study, arms, settled)
            _look_at_text(study)
            _generate(study, arms, settled)
    finally:
        log.close()
    report = summary.write_summary(out)
    best = next(arm for arm in arms if arm.name == report.best)
    model = _trial_folder(out, best, report.best_seed) / "model"
    # Whoever has cleared away the trials of a finished study keeps its best model.
    if model.is_dir() or not (out / BEST).is_dir():
        put_best(out, model)
    return report


# ---- what is settled before the first trial


def _done(log: Recorder) -> int:
    return sum(record["kind"] in ("trial", "tuning") for record in log.records)


def _prepare(study: Study, *, begun: bool) -> dict[str, Any]:
    values = {"config": _plain(study.spec.base), "folder": study.text, "begun": begun}
    facts: dict[str, Any] = study.pool.all([Job("prepare", values, "preparing the text")])[0]
    for text in facts["notices"] if not begun else ():
        study.say(text)
    return facts


def _plain(config: TrainConfig) -> dict[str, Any]:
    values: dict[str, Any] = config.model_dump(mode="json")
    return values


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _layouts(spec: StudySpec, trials: int) -> list[tuple[int, int]]:
    """(workers, threads) that fill the cores; the most workers first."""
    cores = _cores()
    if spec.base.threads is not None:
        return [(max(1, min(cores // spec.base.threads, trials, _MOST_WORKERS)), spec.base.threads)]
    if spec.base.device not in ("auto", "cpu"):
        return [(1, cores)]
    found, workers = [], min(cores, trials, _MOST_WORKERS)
    while workers >= 1:
        found.append((workers, max(1, cores // workers)))
        workers //= 2
    return found


def settle(study: Study, arms: list[Arm], trials: int) -> Settled:
    """Measure what is fastest, and fix the number of steps, the same for every trial.

    A few real steps of every arm tell the dearest one; that one tells which layout of processes and threads
    does the most steps in all; a small whole trial tells what a trial costs beside its steps.
    """
    spec, pool = study.spec, study.pool
    layouts = _layouts(spec, trials)
    workers, threads = layouts[0]
    if spec.base.steps is not None and len(layouts) == 1:
        reason = "as asked"
        return _settled(spec.base.steps, workers, threads, None, reason)
    study.say("measuring a few steps on this machine")
    dearest, step_s, evaluation_s = _dearest(study, arms, threads)
    rates = {(workers, threads): workers / step_s}
    speeds = {(workers, threads): (step_s, evaluation_s)}
    for layout in layouts[1:]:
        values = {"config": _plain(dearest), "folder": study.text, "threads": layout[1]}
        told = pool.all(Job("measure", values, "measuring steps") for _ in range(layout[0]))
        speeds[layout] = max(t["step_s"] for t in told), max(t["evaluation_s"] for t in told)
        rates[layout] = layout[0] / speeds[layout][0]
    workers, threads = max(layouts, key=lambda layout: rates[layout])
    step_s, evaluation_s = speeds[workers, threads]
    pool.resize(workers)
    layout_words = ", ".join(f"{w} x {t} {rates[w, t]:.1f}" for w, t in layouts)
    how = f"workers x threads, steps per second in all: {layout_words}"
    if spec.base.steps is not None:
        return _settled(spec.base.steps, workers, threads, step_s, f"as asked ({how})")
    assert spec.minutes is not None

    rehearsal = with_setting(dearest, "steps", str(_REHEARSAL_STEPS))
    rehearsal = with_setting(rehearsal, "evaluation.every", str(_REHEARSAL_STEPS))
    values = {"config": _plain(rehearsal), "folder": study.text, "threads": threads}
    told = pool.all(Job("rehearse", values, "rehearsing a trial") for _ in range(workers))
    beside = max(t["seconds"] - t["evaluations"] * evaluation_s for t in told) - _REHEARSAL_STEPS * step_s
    seconds = spec.minutes * 60
    reserve = min(_RESERVE_S[1], max(_RESERVE_S[0], seconds / 10)) if spec.sampling is not None else 2.0
    each = (seconds - (time.monotonic() - study.began) - reserve) / math.ceil(trials / workers)
    each -= max(0.0, beside)
    # Evaluations take a fifth of a trial at most, unless that were too few to find the best step.
    evaluations = max(_FEWEST_EVALUATIONS, min(_EVALUATIONS, int(0.2 * each / evaluation_s)))
    steps = int((each - (evaluations + 1) * evaluation_s) / step_s)
    if steps < _FEWEST_STEPS:
        least = max(0.0, beside) + (_FEWEST_EVALUATIONS + 1) * evaluation_s + _FEWEST_STEPS * step_s
        need = least * math.ceil(trials / workers) + (time.monotonic() - study.began) + reserve
        raise ConfigError(
            f"{spec.minutes:g} minutes are too few for {trials} trials of at least {_FEWEST_STEPS} steps "
            f"here; "
            f"give about {math.ceil(1.1 * need / 60)} minutes, fewer arms or seeds, or a smaller model"
        )
    reason = f"what {spec.minutes:g} minutes allow here ({how})"
    return _settled(steps, workers, threads, step_s, reason, evaluations)


def _settled(
    steps: int, workers: int, threads: int, step_s: float | None, reason: str, evaluations: int = _EVALUATIONS
) -> Settled:
    every = max(1, math.ceil(steps / evaluations))
    save = steps if step_s is None else max(1, math.ceil(_CHECKPOINT_S / step_s))
    return Settled(
        steps=steps,
        workers=workers,
        threads=threads,
        evaluate_every=every,
        checkpoint_every=min(save, steps),
        reason=reason,
    )


def _dearest(study: Study, arms: list[Arm], threads: int) -> tuple[TrainConfig, float, float]:
    """The configuration whose steps take longest, with the seconds of a step and of an evaluation."""
    base = study.spec.base
    configs: dict[tuple[Any, ...], TrainConfig] = {}
    for arm in arms:
        config = arm.config(base)
        configs.setdefault((config.model, config.dropout, config.batch, config.accumulate), config)
    listed = list(configs.values())
    jobs = [{"config": _plain(config), "folder": study.text, "threads": threads} for config in listed]
    told = study.pool.all(Job("measure", values, "measuring steps") for values in jobs)
    slowest = max(range(len(listed)), key=lambda i: told[i]["step_s"])
    return listed[slowest], told[slowest]["step_s"], told[slowest]["evaluation_s"]


def _study_record(
    spec: StudySpec, settled: Settled, facts: Mapping[str, Any], command: str, out: Path
) -> dict[str, Any]:
    sampling: dict[str, Any] | None = None
    if spec.sampling is not None:
        sampling = spec.sampling.model_dump(mode="json")
        # Prompt and continuation fit the model's context; a short one is shared out, a quarter to the prompt.
        context = int(facts["model"]["context"])
        if sampling["prompt_tokens"] + sampling["tokens"] > context:
            sampling["prompt_tokens"] = min(sampling["prompt_tokens"], max(1, context // 4))
            sampling["tokens"] = min(sampling["tokens"], context - sampling["prompt_tokens"])
    return {
        "kind": "study",
        "twodice": twodice.__version__,
        "spec": spec.model_dump(mode="json"),
        "settled": settled.model_dump(mode="json"),
        "data": facts["data"],
        "model": facts["model"],
        "lr": facts["lr"],
        "sampling": sampling,
        "machine": {
            **facts["machine"],
            "workers": str(settled.workers),
            "threads each": str(settled.threads),
        },
        "commands": {
            "study": command,
            "report": shlex.join(["twodice", "report", str(out)]),
            "generate": f"twodice generate {shlex.quote(str(out / BEST))} --prompt 'The' --top-k 50 --seed 0",
            "load": f"AutoModelForCausalLM.from_pretrained({str(out / BEST)!r})",
        },
    }


# ---- the trials


def _trial_config(config: TrainConfig, settled: Settled, seed: int) -> TrainConfig:
    values = config.model_dump()
    values.update(steps=settled.steps, epochs=None, minutes=None, seed=seed, threads=settled.threads)
    if values["evaluation"]["every"] is None:
        values["evaluation"]["every"] = settled.evaluate_every
    if values["checkpoint"]["every"] is None:
        values["checkpoint"]["every"] = settled.checkpoint_every
    values["checkpoint"]["keep"] = 1  # what a trial leaves behind is its model
    return TrainConfig.model_validate(values)


def _tune(study: Study, arms: list[Arm], settled: Settled) -> None:
    seed = study.spec.tuning_seed
    todo: list[tuple[dict[str, Any], Job]] = []
    for arm in arms:
        for number, values in enumerate(study.spec.tunings()):
            if study.log.has("tuning", arm=arm.name, values=values):
                continue
            config = arm.config(study.spec.base)
            for name, value in values.items():
                config = with_setting(config, name, value)
            out = study.out / TUNING / arm.slug / str(number)
            name = f"tuning of '{arm.name}', {' '.join(f'{k}={v}' for k, v in values.items())}"
            record = {"kind": "tuning", "arm": arm.name, "values": values}
            todo.append((record, _trial_job(study, config, settled, seed, out, name)))
    for record, result in _trained(study, "tuning", settled, todo):
        lowest = min(e["validation_a_nats_per_token"] for e in result["evaluations"])
        study.log.write({**record, "seed": seed, "validation_a_nats_per_token": lowest})


def _train(study: Study, arms: list[Arm], settled: Settled) -> None:
    found = summary.sort_records(study.log.records)
    todo: list[tuple[dict[str, Any], Job]] = []
    for seed in study.spec.seed_list:  # a study that is stopped has all arms of its first seeds
        for arm in arms:
            if study.log.has("trial", arm=arm.name, seed=seed):
                continue
            config = arm.config(study.spec.base)
            for name, value in found.tuned(arm.name).items():
                config = with_setting(config, name, value)
            out = _trial_folder(study.out, arm, seed)
            job = _trial_job(study, config, settled, seed, out, f"'{arm.name}', seed {seed}")
            job.values.update(b_windows=B_WINDOWS, mechanisms=True)
            todo.append(({"kind": "trial", "arm": arm.name, "seed": seed}, job))
    for record, result in _trained(study, "training", settled, todo):
        told = ("steps", "best_step", "evaluations", "validation_b", "mechanisms")
        study.log.write({**record, **{k: result[k] for k in told if k in result}})


def _trial_folder(out: Path, arm: Arm, seed: int) -> Path:
    return out / TRIALS / arm.slug / str(seed)


def _trial_job(study: Study, config: TrainConfig, settled: Settled, seed: int, out: Path, name: str) -> Job:
    told = _plain(_trial_config(config, settled, seed))
    values = {"config": told, "folder": study.text, "out": str(out), "threads": settled.threads}
    return Job("train", values, name)


def _trained(
    study: Study, title: str, settled: Settled, todo: list[tuple[dict[str, Any], Job]]
) -> Iterable[tuple[dict[str, Any], dict[str, Any]]]:
    """Train what is to be trained and yield each trial's record and result as it is done."""
    if not todo:
        return
    spec = study.spec
    arms = len(spec.arms)
    everything = arms * (spec.seeds if title == "training" else len(spec.tunings()))
    finished = everything - len(todo)
    at: dict[int, int] = {}
    with study.bar(title, everything * settled.steps, finished * settled.steps) as shown:

        def on_progress(index: int, event: Mapping[str, Any]) -> None:
            if event["kind"] == "notice":
                shown.say(f"{todo[index][1].name}: {event['text']}")
                return
            at[index] = int(event["step"])
            shown.update(finished * settled.steps + sum(at.values()), f"trial {finished + 1} of {everything}")

        for index, result in study.pool.run((job for _, job in todo), on_progress):
            yield todo[index][0], result
            # Only the best step's model is needed any more; checkpoints would fill the disk.
            shutil.rmtree(Path(todo[index][1].values["out"]) / "checkpoints", ignore_errors=True)
            finished += 1
            at.pop(index, None)
            best = min(result["evaluations"], key=lambda e: e["validation_a_nats_per_token"])
            shown.say(
                f"{todo[index][1].name}: best at step {best['step']}, validation "
                f"{best['validation_b_nats_per_token']:.4f} nats per token; at the end "
                f"{result['evaluations'][-1]['validation_b_nats_per_token']:.4f}"
            )
            shown.update(finished * settled.steps + sum(at.values()), f"trial {finished} of {everything}")


# ---- the second die


def _look_at_text(study: Study) -> None:
    if not study.log.has("sanity"):
        result = study.pool.all([Job("sanity", {"folder": study.text}, "sanity lines")])[0]
        study.log.write({"kind": "sanity", **result})


def _generate(study: Study, arms: list[Arm], settled: Settled) -> None:
    record = next(r for r in study.log.records if r["kind"] == "study")
    if record["sampling"] is None:
        return
    plan = {**record["sampling"], "shown": _SHOWN_PROMPTS}
    if not study.log.has("human"):
        asked: dict[str, Any] = {"folder": study.text, "plan": plan}
        study.log.write({"kind": "human", **study.pool.all([Job("human", asked, "held-out text")])[0]})
    report = summary.summarise(study.log.records)
    names, _, _ = summary.choose_cross(report.arms, report.baseline, report.best)
    by_name = {arm.name: arm for arm in arms}
    last = settings_of(plan["top_k"], plan["temperature"])[-1].model_dump()
    todo = [
        (name, seed)
        for seed in report.seeds
        for name in names
        if not study.log.has("sampling", arm=name, seed=seed, setting=last)
    ]
    jobs = []
    for name, seed in todo:
        folder = _trial_folder(study.out, by_name[name], seed) / "model"
        values: dict[str, Any] = {"folder": study.text, "model": str(folder), "plan": plan}
        values["threads"] = settled.threads
        jobs.append(Job("generate", values, f"texts of '{name}', seed {seed}"))
    if not jobs:
        return
    everything = len(report.seeds) * len(names)
    with study.bar("generating", everything, everything - len(jobs)) as shown:
        for done, (index, result) in enumerate(study.pool.run(jobs), start=everything - len(jobs) + 1):
            name, seed = todo[index]
            if seed == report.seeds[0]:
                shown_each = min(_SHOWN_PROMPTS, result["texts"])
                for i, example in enumerate(result["examples"]):
                    row: dict[str, Any] = {
                        "kind": "example",
                        "arm": name,
                        "seed": seed,
                        "number": i % shown_each,
                        **example,
                    }
                    study.log.write(row)
            for cell in result["settings"]:
                study.log.write(
                    {"kind": "sampling", "arm": name, "seed": seed, "texts": result["texts"], **cell}
                )
            shown.update(done)

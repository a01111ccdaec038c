"""The training run, from top to bottom: resolve, make or resume, evaluate, save, step, export.

A run is a function of its configuration, its text and the kind of machine. It may be stopped or killed at any
moment; the same call goes on from the newest whole checkpoint and ends with the same bits. Nothing is printed
here: what happens is told to `on_event`. Does not know the command line, nor how text is sampled.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from twodice.errors import CheckpointError, ConfigError, Interrupted
from twodice.text.store import TokenStore
from twodice.training import checkpoint as disk
from twodice.training import run_folder
from twodice.training.budget import Resolved, resolve, resolve_text
from twodice.training.config import TrainConfig, read_config
from twodice.training.evaluate import FixedWindows, StopAsked, evaluate
from twodice.training.export import export_model
from twodice.training.init import generator_set_aside
from twodice.training.measure import measure_speed
from twodice.training.metrics import MetricsLog, read_head
from twodice.training.models import build_model, model_facts, put_weights, weights_of
from twodice.training.progress import Best, Clock
from twodice.training.step import TrainingStep, choose_device, choose_dtype, make_arithmetic

WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.safetensors"
_PROBE_ROWS = 2

Event = Mapping[str, Any]


@dataclass(frozen=True)
class TrainResult:
    """What a finished run is.

    Attributes
    ----------
    steps
        Optimizer steps done.
    best_step
        Step of the evaluation with the lowest loss on validation A (the first of equal ones).
    evaluations
        The records of all evaluations, as in ``metrics.jsonl``.
    out
        The run's folder.
    model
        Folder of the exported model, or None where no export was asked for.
    """

    steps: int
    best_step: int
    evaluations: list[dict[str, Any]] = field(repr=False)
    out: Path
    model: Path | None


def train(
    config: TrainConfig,
    store: TokenStore,
    out: str | Path,
    *,
    on_event: Callable[[Event], None] | None = None,
    stop: Callable[[], bool] | None = None,
    final: bool = False,
    export: bool = True,
) -> TrainResult:
    """Train a model, or go on with the run that is in `out`.

    Parameters
    ----------
    config
        As asked for; what is left open is settled and written to ``config.json`` before the first step.
    store
        The tokens, as `twodice.text.store.prepare` made them.
    out
        The run's folder.
    on_event
        Is told what happens: mappings with a ``kind`` of ``resolved``, ``resumed``, ``train``,
        ``evaluation``, ``checkpoint``, ``notice`` or ``done``.
    stop
        Polled in every loop; once true, the state is saved and `Interrupted` is raised.
    final
        Export the last step instead of the best one.
    export
        False leaves ``model/`` away; `export_run` makes it later.

    Raises
    ------
    ConfigError
        The settings cannot be meant, or `out` holds a run with other settings.
    CheckpointError
        The disk refused, or every checkpoint is damaged.
    Interrupted
        `stop` became true; the same call goes on from there.
    TwodiceError
        The loss is no longer finite.

    Randomness
    ----------
    Everything is a function of ``config.seed``; see `TrainingStep` and `new_model`. Torch's generators are
    left as found.
    """
    out = Path(out)
    tell = on_event if on_event is not None else _nobody
    stop = stop if stop is not None else _never
    device = choose_device(config.device)
    threads_before = torch.get_num_threads()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    try:
        with run_folder.only_one_in(out), generator_set_aside(device), contextlib.ExitStack() as ends:
            return _run(config, store, out, device, tell, stop, final, export, ends)
    except StopAsked:
        raise Interrupted(f"before the first step; the same command begins again ({out})") from None
    finally:
        torch.set_num_threads(threads_before)


def _run(
    requested: TrainConfig,
    store: TokenStore,
    out: Path,
    device: torch.device,
    tell: Callable[[Event], None],
    stop: Callable[[], bool],
    final: bool,
    export: bool,
    ends: contextlib.ExitStack,
) -> TrainResult:
    # ---- what is to be done: settled and written down before the first step, or read back ----
    if run_folder.is_used(out):
        config = _reopened(out, requested, store, device, tell)
        finished = _finished(out, store, final, export, tell)
        if finished is not None:
            return finished
    else:
        resolved = _settled(requested, store, device, stop)
        config = resolved.config
        run_folder.begin_run(out, requested, config, _facts(store, device, resolved))
        tell({"kind": "resolved", "config": config, "reasons": resolved.reasons})
    assert config.steps is not None and config.batch is not None and config.context is not None
    assert config.evaluation.every is not None and config.checkpoint.every is not None

    # ---- the model, its dropout, the optimizer, the fixed windows ----
    model, notes = build_model(config, store)
    for note in notes:
        tell({"kind": "notice", "text": note})
    model.to(device).train()
    arithmetic = make_arithmetic(device, config.dtype)
    do_step = TrainingStep(config, store, model, device, arithmetic)
    ends.callback(do_step.close)
    windows = FixedWindows(store, config.context, config.evaluation.windows)

    # ---- the state: that of step 0, or of the newest whole checkpoint ----
    folder = out / run_folder.CHECKPOINTS
    state = _newest(folder, out / run_folder.METRICS, tell)
    step = 0 if state is None else int(state["step"])
    log = MetricsLog(out / run_folder.METRICS, None if state is None else state["metrics"])
    ends.callback(log.close)
    best = Best.from_records(log.records)
    for record in log.records:
        do_step.observe(record)
    if state is not None:
        path = disk.checkpoint_path(folder, step)
        put_weights(model, disk.read_tensors(path, WEIGHTS))
        do_step.put_moments(disk.read_tensors(path, OPTIMIZER))
        tell({"kind": "resumed", "step": step, "steps": config.steps})
    disk.prune_checkpoints(folder, disk.list_steps(folder))
    saved_step = -1 if state is None else step
    kept: dict[str, torch.Tensor] | None = None  # the best weights, until a checkpoint takes them to the disk

    def save() -> None:
        nonlocal kept, saved_step
        if saved_step == step:
            return
        mark = log.mark()
        if kept is not None and best.step != step and not _is_whole(disk.checkpoint_path(folder, best.step)):
            disk.save_checkpoint(folder, best.step, {WEIGHTS: kept}, {"step": best.step, "resumable": False})
        facts = {"step": step, "resumable": True, "best_step": best.step, "metrics": mark}
        tensors = {WEIGHTS: weights_of(model), OPTIMIZER: do_step.moments()}
        disk.save_checkpoint(folder, step, {k: v for k, v in tensors.items() if v}, facts)
        kept, saved_step = None, step
        _prune(folder, config.checkpoint.keep, best.step)
        tell({"kind": "checkpoint", "step": step})

    # ---- evaluate, save, step: until all steps are done ----
    clock = Clock(out / run_folder.TIMINGS, tokens_per_step=config.batch * config.context)
    try:
        while True:
            is_last = step == config.steps
            is_measured = bool(log.records) and log.records[-1]["step"] == step
            if (step % config.evaluation.every == 0 or is_last) and not is_measured:
                log.flush()
                rows = max(1, 2 * do_step.rows)
                losses = evaluate(model, windows, rows=rows, device=device, arithmetic=arithmetic, stop=stop)
                record = {"kind": "evaluation", "step": step, **losses}
                log.write(record)
                do_step.observe(record)
                saved_step = -1  # a checkpoint that a stop has made of this step does not know the evaluation
                is_better = best.see(record)
                if is_better:
                    kept = {
                        name: tensor.detach().to("cpu", copy=True)
                        for name, tensor in weights_of(model).items()
                    }
                tell({**record, "steps": config.steps, "best_step": best.step})
                for text in best.notices(log.records):
                    tell({"kind": "notice", "text": text})
            if step % config.checkpoint.every == 0 or is_last:
                clock.write(step)
                save()
            if is_last:
                break
            loss = do_step(step, stop)
            step += 1
            record = {
                "kind": "train",
                "step": step,
                "loss_nats_per_token": loss,
                "lr": do_step.rate(step - 1),
                "tokens": step * config.batch * config.context,
            }
            log.write(record)
            clock.count(step)
            tell({**record, "steps": config.steps, "tokens_per_s": clock.rate})
    except StopAsked:
        save()
        raise Interrupted(
            f"at step {step} of {config.steps}; the same command goes on from there ({out})"
        ) from None

    # ---- the model's folder, and the mark that all is done ----
    ends.close()
    if export:
        _export(model, store, out, config, config.steps if final else best.step, tell)
    else:
        _write_result(out, config.steps, best.step, None, None)
    tell({"kind": "done", "step": step, "best_step": best.step, "out": str(out)})
    return _result(out)


def export_run(
    out: str | Path,
    store: TokenStore,
    *,
    final: bool = False,
    on_event: Callable[[Event], None] | None = None,
) -> Path:
    """Write ``model/`` of a finished run, of the best step or of the last, and return its path."""
    out = Path(out)
    if not (out / run_folder.RESULT).is_file():
        raise CheckpointError(f"{out} must hold a finished run; give the command that began it once more")
    config = read_config(out / run_folder.CONFIG)
    result = run_folder.read_json(out / run_folder.RESULT)
    model, _ = build_model(config, store)
    step = int(result["steps"] if final else result["best_step"])
    _export(model, store, out, config, step, on_event if on_event is not None else _nobody)
    return out / run_folder.MODEL


def score_validation_b(
    out: str | Path,
    store: TokenStore,
    most_windows: int,
    *,
    stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """The losses of a finished run's best and last weights on validation text B, all of it where it is short.

    The evaluations of a run look at ``evaluation.windows`` windows only, so that they cost little; what is
    compared afterwards should not hang on the choice of these windows.

    Parameters
    ----------
    most_windows
        Windows looked at, at most, in [1, inf): spread evenly where there are more.

    Returns
    -------
    dict
        ``windows`` looked at and ``there``, and for ``best`` and ``end`` each ``nats_per_token`` and
        ``bits_per_byte``.

    Raises
    ------
    CheckpointError
        The checkpoint of one of the two steps is gone or damaged.
    Interrupted
        `stop` became true; nothing has changed.
    """
    out = Path(out)
    config = read_config(out / run_folder.CONFIG)
    result = run_folder.read_json(out / run_folder.RESULT)
    assert config.context is not None and config.batch is not None
    device = choose_device(config.device)
    arithmetic = make_arithmetic(device, config.dtype)
    windows = FixedWindows(store, config.context, most_windows, ("validation_b",))
    found: dict[str, Any] = {
        "windows": len(windows.inputs_NT["validation_b"]),
        "there": windows.there["validation_b"],
    }
    model, _ = build_model(config, store)
    model.to(device)
    for name, step in (("best", result["best_step"]), ("end", result["steps"])):
        path = disk.checkpoint_path(out / run_folder.CHECKPOINTS, int(step))
        disk.verify_checkpoint(path)
        put_weights(model, disk.read_tensors(path, WEIGHTS))
        try:
            losses = evaluate(
                model,
                windows,
                rows=max(1, 2 * config.batch // config.accumulate),
                device=device,
                arithmetic=arithmetic,
                stop=stop if stop is not None else _never,
            )
        except StopAsked:
            raise Interrupted(f"while {out} was scored; the same command scores it again") from None
        found[name] = {
            "nats_per_token": losses["validation_b_nats_per_token"],
            "bits_per_byte": losses["validation_b_bits_per_byte"],
        }
    return found


# ---- the parts of the story above ----


def _settled(
    requested: TrainConfig, store: TokenStore, device: torch.device, stop: Callable[[], bool]
) -> Resolved:
    resolved = resolve(requested, store, lambda candidate: measure_speed(candidate, store, device, stop))
    reasons = dict(resolved.reasons)
    values = resolved.config.model_dump()
    dtype = choose_dtype(requested.dtype, device)
    if requested.device == "auto":
        reasons["device"] = (
            "the first accelerator there is" if device.type != "cpu" else "no accelerator is here"
        )
    if requested.dtype == "auto":
        reasons["dtype"] = (
            f"{device} computes in it" if dtype == "bfloat16" else f"{device} has no bfloat16 of its own"
        )
    values.update(device=str(device), dtype=dtype, epochs=None, minutes=None)
    return Resolved(TrainConfig.model_validate(values), reasons)


def _facts(store: TokenStore, device: torch.device, resolved: Resolved) -> dict[str, Any]:
    return {
        "reasons": resolved.reasons,
        "data_digest": store.digest,
        "threads": torch.get_num_threads(),
        "device": str(device),
        "machine": run_folder.machine(),
    }


def _reopened(
    out: Path, requested: TrainConfig, store: TokenStore, device: torch.device, tell: Callable[[Event], None]
) -> TrainConfig:
    config, record = run_folder.reopen_run(out, requested)
    if record["data_digest"] != store.digest:
        raise ConfigError(
            f"{out} was trained on other tokens ({record['data_digest'][:12]} there, {store.digest[:12]} "
            "here); give the same text, or another --out"
        )
    here = {"threads": torch.get_num_threads(), "device": str(device), **run_folder.machine()}
    there = {"threads": record["threads"], "device": record["device"], **record["machine"]}
    changed = [
        f"{name} {there[name]} there, {here[name]} here" for name in here if here[name] != there.get(name)
    ]
    if changed and not (out / run_folder.RESULT).is_file():
        text = (
            f"the run goes on with {'; '.join(changed)}: same batches and masks, but the last bits of sums "
            "may differ from those of an uninterrupted run"
        )
        tell({"kind": "warning", "text": text})
    return config


def _finished(
    out: Path, store: TokenStore, final: bool, export: bool, tell: Callable[[Event], None]
) -> TrainResult | None:
    if not (out / run_folder.RESULT).is_file():
        return None
    record = run_folder.read_json(out / run_folder.RESULT)
    wanted = record["steps"] if final else record["best_step"]
    if export and (record["exported_step"] != wanted or not (out / run_folder.MODEL).is_dir()):
        export_run(out, store, final=final, on_event=tell)
        step = run_folder.read_json(out / run_folder.RESULT)["exported_step"]
        tell(
            {"kind": "notice", "text": f"the run in {out} was finished before; model/ now holds step {step}"}
        )
    else:
        tell({"kind": "notice", "text": f"the run in {out} is finished: nothing to do"})
    return _result(out)


def _newest(folder: Path, metrics: Path, tell: Callable[[Event], None]) -> dict[str, Any] | None:
    def accept(state: dict[str, Any]) -> str | None:
        if not state["resumable"]:
            return ""
        return (
            None if read_head(metrics, state["metrics"]) is not None else f"{metrics} does not hold its lines"
        )

    found = disk.newest_checkpoint(
        folder, accept=accept, warn=lambda text: tell({"kind": "warning", "text": text})
    )
    return None if found is None else found[1]


def _is_whole(path: Path) -> bool:
    try:
        disk.verify_checkpoint(path)
    except CheckpointError:
        return False
    return True


def _prune(folder: Path, keep: int, best_step: int) -> None:
    """Keep step 0, the last `keep` that can be gone on from, and the best weights that each of these refers
    to."""
    states = {}
    for step in disk.list_steps(folder):
        try:
            states[step] = json.loads((disk.checkpoint_path(folder, step) / disk.STATE).read_bytes())
        except (OSError, ValueError):  # damaged: not worth keeping, and no reason to fail
            continue
    last = [step for step, state in states.items() if state["resumable"]][-keep:]
    best = {states[step]["best_step"] for step in last}
    disk.prune_checkpoints(folder, {0, best_step, *last, *best})


def _export(
    model: torch.nn.Module,
    store: TokenStore,
    out: Path,
    config: TrainConfig,
    step: int,
    tell: Callable[[Event], None],
) -> None:
    step = _whole_step(out, step, tell)
    path = disk.checkpoint_path(out / run_folder.CHECKPOINTS, step)
    put_weights(model, disk.read_tensors(path, WEIGHTS))
    assert config.context is not None and config.steps is not None
    windows = FixedWindows(store, config.context, _PROBE_ROWS)
    facts = model_facts(config.model)
    source = facts.tokenizer if facts.is_folder else None
    target = out / run_folder.MODEL
    difference = export_model(model, store, target, source=source, probe=windows.inputs_NT["validation_a"])
    records = run_folder.evaluations(out)
    _write_result(out, config.steps, Best.from_records(records).step, step, difference)
    tell({"kind": "exported", "step": step, "path": str(target), "largest_logit_difference": difference})


def _whole_step(out: Path, wanted: int, tell: Callable[[Event], None]) -> int:
    """`wanted`, or where it is damaged the whole checkpoint with the lowest loss on validation A."""
    folder = out / run_folder.CHECKPOINTS
    try:
        disk.verify_checkpoint(disk.checkpoint_path(folder, wanted))
        return wanted
    except CheckpointError as error:
        losses = {r["step"]: r["validation_a_nats_per_token"] for r in run_folder.evaluations(out)}
        there = [s for s in disk.list_steps(folder) if s in losses]
        whole = [s for s in there if _is_whole(disk.checkpoint_path(folder, s))]
        if not whole:
            raise
        step = min(whole, key=lambda s: losses[s])
        text = (
            f"the weights of step {wanted} are lost ({error}); model/ takes step {step}, the best whole one"
        )
        tell({"kind": "warning", "text": text})
        return step


def _write_result(
    out: Path, steps: int, best_step: int, exported: int | None, difference: float | None
) -> None:
    record = {
        "steps": steps,
        "best_step": best_step,
        "exported_step": exported,
        "largest_logit_difference": difference,
    }
    disk.write_file(out / run_folder.RESULT, (json.dumps(record, indent=2) + "\n").encode())


def _result(out: Path) -> TrainResult:
    record = run_folder.read_json(out / run_folder.RESULT)
    model = out / run_folder.MODEL
    return TrainResult(
        steps=record["steps"],
        best_step=record["best_step"],
        evaluations=run_folder.evaluations(out),
        out=out,
        model=model if record["exported_step"] is not None else None,
    )


def _nobody(event: Event) -> None:
    pass


def _never() -> bool:
    return False


__all__ = ["TrainResult", "export_run", "resolve_text", "score_validation_b", "train"]

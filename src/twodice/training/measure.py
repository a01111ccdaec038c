"""How fast this machine takes real steps of a run, measured on a model of its own. Knows nothing of
folders."""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from twodice.text.store import TokenStore
from twodice.training.budget import Resolved, Speed, num_parameters, resolve, state_bytes
from twodice.training.config import TrainConfig
from twodice.training.evaluate import SPLITS, FixedWindows, evaluate
from twodice.training.init import generator_set_aside
from twodice.training.models import build_model
from twodice.training.step import TrainingStep, choose_device, choose_dtype, make_arithmetic

_STEPS = 5
_ENOUGH_S = 6.0


def measure_speed(
    config: TrainConfig, store: TokenStore, device: torch.device, stop: Callable[[], bool] | None = None
) -> Speed:
    """Time a few real steps and one evaluation, with dropout as in the run; the first step warms up and is
    not counted.

    The median of the times is taken: what else the machine does now, it will do during the run as well.

    Raises
    ------
    StopAsked
        `stop` became true.

    Randomness
    ----------
    As in a run; torch's generators are left as found.
    """
    stop = stop if stop is not None else _never
    with generator_set_aside(device):
        model, _ = build_model(config, store)
        model.to(device).train()
        arithmetic = make_arithmetic(device, choose_dtype(config.dtype, device))
        do_step = TrainingStep(config, store, model, device, arithmetic)
        times: list[float] = []
        began = time.perf_counter()
        for step in range(_STEPS + 1):
            times.append(_timed(lambda step=step: do_step(step, stop)))  # type: ignore[misc]
            if step >= 1 and time.perf_counter() - began > _ENOUGH_S:
                break
        assert config.context is not None
        windows = FixedWindows(store, config.context, config.evaluation.windows)
        rows = max(1, 2 * do_step.rows)
        evaluation_s = _timed(
            lambda: evaluate(model, windows, rows=rows, device=device, arithmetic=arithmetic, stop=stop)
        )
        do_step.close()
    return Speed(statistics.median(times[1:]), evaluation_s, _peak_bytes(device))


def make_plan(config: TrainConfig, store: TokenStore) -> tuple[Resolved, dict[str, Any]]:
    """Settle a configuration and say what the run would be: steps, tokens, parameters, memory, time.

    Returns
    -------
    tuple
        The settled configuration with its reasons, and the facts as plain values: counts, bytes, and
        ``step_ms`` [ms] and ``seconds`` [s] from a few real steps on this machine.
    """
    device = choose_device(config.device)
    resolved = resolve(config, store, lambda candidate: measure_speed(candidate, store, device))
    settled = resolved.config
    speed = measure_speed(settled, store, device)
    model, _ = build_model(settled, store)
    assert settled.steps is not None and settled.batch is not None and settled.context is not None
    assert settled.evaluation.every is not None
    parameters = num_parameters(model)
    windows = store.splits["train"].num_windows(settled.context)
    evaluations = settled.steps // settled.evaluation.every + 1
    return resolved, {
        **{f"tokens_{name}": int(store.splits[name].num_tokens) for name in SPLITS},
        "vocabulary": int(store.vocabulary),
        "steps": settled.steps,
        "tokens_per_step": settled.batch * settled.context,
        "tokens_seen": settled.steps * settled.batch * settled.context,
        "epochs": settled.steps * settled.batch / windows,
        "parameters": parameters,
        "state_bytes": state_bytes(parameters),
        "peak_bytes": speed.peak_bytes,
        "step_ms": speed.step_s * 1e3,
        "seconds": settled.steps * speed.step_s + evaluations * speed.evaluation_s,
    }


def _timed(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


def _never() -> bool:
    return False

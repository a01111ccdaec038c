"""How fast this machine takes real steps of a run, measured on a model of its own. Knows nothing of
folders."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch

from twodice.training.budget import Speed
from twodice.training.config import TrainConfig
from twodice.training.evaluate import FixedWindows, evaluate
from twodice.training.init import generator_set_aside
from twodice.training.models import build_model
from twodice.training.step import TrainingStep, choose_dtype, make_arithmetic

_STEPS = 5
_ENOUGH_S = 6.0


def measure_speed(config: TrainConfig, store: Any, device: torch.device) -> Speed:
    """Time a few real steps and one evaluation, with dropout as in the run; the first step warms up and is
    not counted.

    The least of the times is taken, because other work on the machine only adds to them.

    Randomness
    ----------
    As in a run; torch's generators are left as found.
    """
    with generator_set_aside(device):
        model, _ = build_model(config, store)
        model.to(device).train()
        arithmetic = make_arithmetic(device, choose_dtype(config.dtype, device))
        do_step = TrainingStep(config, store, model, device, arithmetic)
        times: list[float] = []
        began = time.perf_counter()
        for step in range(_STEPS + 1):
            times.append(_timed(lambda step=step: do_step(step, _never)))  # type: ignore[misc]
            if step >= 1 and time.perf_counter() - began > _ENOUGH_S:
                break
        assert config.context is not None
        windows = FixedWindows(store, config.context, config.evaluation.windows)
        rows = max(1, 2 * do_step.rows)
        evaluation_s = _timed(
            lambda: evaluate(model, windows, rows=rows, device=device, arithmetic=arithmetic, stop=_never)
        )
        do_step.close()
    return Speed(min(times[1:]), evaluation_s, _peak_bytes(device))


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

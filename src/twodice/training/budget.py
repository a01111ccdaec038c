"""What was left open is settled here, each with its reason: context, batch, steps, rates, how often to
measure and save.

Pure but for the one measurement that ``--minutes`` needs, which is handed in. Does not know the loop.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from twodice.dropout.plan import DropoutPlan
from twodice.errors import ConfigError, DataError
from twodice.text.store import TokenStore
from twodice.training.config import FEW_EPOCHS, TrainConfig, with_value
from twodice.training.models import model_facts
from twodice.training.presets import PRESETS

_FEWEST_STEPS, _MOST_STEPS = 200, 2000
_EVALUATIONS, _FEWEST_EVALUATIONS = 20, 5
_EVALUATION_SHARE = 0.15


@dataclass(frozen=True)
class Speed:
    """What a few real steps took on this machine [s], and the peak of memory then [bytes]."""

    step_s: float
    evaluation_s: float
    peak_bytes: int


@dataclass(frozen=True)
class Resolved:
    """A configuration with nothing left open, and why each derived value is what it is, by dotted name."""

    config: TrainConfig
    reasons: dict[str, str]


def resolve_text(config: TrainConfig) -> Resolved:
    """Settle what must be known before the text is read: the tokenizer and the context.

    Raises
    ------
    ConfigError
        The model, the plan of dropout or the context cannot be meant.
    """
    DropoutPlan.parse(config.dropout)
    facts = model_facts(config.model)
    reasons: dict[str, str] = {}
    if config.tokenizer is None:
        name, why = facts.tokenizer, "trained on the training part"
        if facts.is_folder:
            why = "the model's own"
        elif all(source.partition(":")[0] == "markov" for source in config.data):
            name, why = "bytes", "the entropy of markov is known a byte"
        config, reasons["tokenizer"] = with_value(config, "tokenizer", name), why
    if config.context is None:
        config = with_value(config, "context", facts.context)
        reasons["context"] = facts.why
    assert config.context is not None
    if facts.longest is not None and config.context > facts.longest:
        raise ConfigError(f"context must be at most the model's own {facts.longest}; got {config.context}")
    return Resolved(config, reasons)


def resolve(
    config: TrainConfig, store: TokenStore, measure: Callable[[TrainConfig], Speed] | None = None
) -> Resolved:
    """Settle everything else.

    Parameters
    ----------
    config
        As asked for.
    store
        The tokens.
    measure
        Times a few real steps of a configuration that is settled but for its steps; needed for ``minutes``
        only.
    """
    before = resolve_text(config)
    config, reasons = before.config, dict(before.reasons)
    facts = model_facts(config.model)
    context = config.context
    assert context is not None
    if config.vocabulary is None and config.tokenizer == "bpe":
        config = with_value(config, "vocabulary", store.vocabulary)
        reasons["vocabulary"] = "from the amount of training text"
    windows = store.splits["train"].num_windows(context)
    if windows < 1:
        raise DataError(
            f"the training part must fill one window of {context} tokens; use a smaller --context"
        )

    if config.batch is None:
        config, reasons["batch"] = _with_batch(config, facts.batch, windows, facts.why)
    if config.optimizer.lr is None:
        config, reasons["optimizer.lr"] = with_value(config, "optimizer.lr", facts.lr), facts.why
    if config.optimizer.min_lr is None:
        assert config.optimizer.lr is not None
        config = with_value(config, "optimizer.min_lr", config.optimizer.lr / 10)
        reasons["optimizer.min_lr"] = "a tenth of lr"
    peak, floor = config.optimizer.lr, config.optimizer.min_lr
    if peak is not None and floor is not None and floor > peak:
        raise ConfigError(f"optimizer.min_lr must be at most lr {peak:g}; got {floor:g}")

    if config.steps is None:
        config, reasons["steps"] = _with_steps(config, windows, measure)
    steps = config.steps
    assert steps is not None
    if config.optimizer.warmup is None:
        config = with_value(config, "optimizer.warmup", min(200, max(1, steps // 20)))
        reasons["optimizer.warmup"] = "5 % of the steps, at most 200"
    if config.evaluation.every is None:
        assert config.batch is not None
        every, reasons["evaluation.every"] = _evaluation_every(
            steps, config.evaluation.windows / config.batch
        )
        config = with_value(config, "evaluation.every", every)
    if config.checkpoint.every is None:
        config = with_value(config, "checkpoint.every", max(1, math.ceil(steps / _EVALUATIONS)))
        reasons["checkpoint.every"] = f"a twentieth of {steps} steps"
    return Resolved(config, reasons)


def _evaluation_every(steps: int, cost: float) -> tuple[int, str]:
    """Steps between evaluations, and why; `cost` is that of one in steps.

    It reads three parts of the text and computes no gradients, a third of a step: ``windows / batch`` steps.
    """
    usual = math.ceil(steps / _EVALUATIONS)
    affordable = math.ceil(cost / _EVALUATION_SHARE)
    if usual >= affordable:
        return max(1, usual), f"a twentieth of {steps} steps"
    every = max(1, min(affordable, math.ceil(steps / _FEWEST_EVALUATIONS)))
    return every, f"a fifth of {steps} steps at most, else so that evaluations take 15 % of the time"


def _with_batch(config: TrainConfig, usual: int, windows: int, why: str) -> tuple[TrainConfig, str]:
    batch = usual
    while batch > 1 and batch > windows:
        batch //= 2
    if batch < usual:
        why = f"the training part has {windows} windows only"
    multiple = math.ceil(batch / config.accumulate) * config.accumulate
    if multiple != batch:
        why += f", rounded up to a multiple of accumulate {config.accumulate}"
    return with_value(config, "batch", multiple), why


def _with_steps(
    config: TrainConfig, windows: int, measure: Callable[[TrainConfig], Speed] | None
) -> tuple[TrainConfig, str]:
    batch = config.batch
    assert batch is not None
    if config.epochs is not None:
        steps = max(1, round(config.epochs * windows / batch))
        why = f"{config.epochs:g} epochs of {windows} windows in batches of {batch}"
        return with_value(config, "steps", steps), why
    if config.minutes is not None:
        assert measure is not None, "minutes need a measurement"
        minutes = config.minutes
        # The measurement trains a few steps of a run of the shortest usual length; its schedule does not
        # matter.
        speed = measure(resolve_for_measurement(config))
        # Start, export and the self-check of the export take a little beside the steps.
        left = minutes * 60 * 0.97
        steps = max(1, int(left / speed.step_s))
        while steps > 1 and _seconds(steps, config, speed) > left:
            steps = int(steps * 0.99)
        why = f"{minutes:g} minutes at {speed.step_s * 1e3:.0f} ms a step, measured here"
        return with_value(config, "steps", steps), why
    wanted = round(FEW_EPOCHS * windows / batch)
    steps = min(_MOST_STEPS, max(_FEWEST_STEPS, wanted))
    why = f"{FEW_EPOCHS} epochs would be {wanted} steps"
    if steps != wanted:
        why += f"; at least {_FEWEST_STEPS} and at most {_MOST_STEPS} unless said"
    return with_value(config, "steps", steps), why


def _seconds(steps: int, config: TrainConfig, speed: Speed) -> float:
    """Time of a run of `steps` with its evaluations [s]."""
    assert config.batch is not None
    every = config.evaluation.every
    if every is None:
        every, _ = _evaluation_every(steps, config.evaluation.windows / config.batch)
    return steps * speed.step_s + (steps // every + 1) * speed.evaluation_s


def resolve_for_measurement(config: TrainConfig) -> TrainConfig:
    """A settled configuration of the shortest usual length, for timing a few steps."""
    values = config
    if values.steps is None:
        values = with_value(values, "steps", _FEWEST_STEPS)
    if values.optimizer.warmup is None:
        values = with_value(values, "optimizer.warmup", 0)
    for name in ("evaluation.every", "checkpoint.every"):
        values = with_value(values, name, _FEWEST_STEPS)
    return values


def num_parameters(model: Any) -> int:
    """Parameters of a model, tied ones counted once."""
    return sum(p.numel() for p in model.parameters())


def state_bytes(parameters: int) -> int:
    """Bytes that weights, gradients, the two moments of AdamW and the copy of the best weights take in
    float32."""
    return parameters * 4 * 5


__all__ = ["PRESETS", "Resolved", "Speed", "num_parameters", "resolve", "resolve_text", "state_bytes"]

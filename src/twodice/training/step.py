"""One optimizer step: the batch of that step, its masks, the gradients summed over micro-batches, AdamW.

A function of the weights, the moments and the step's number alone, so that any split into micro-batches and,
later, over ranks gives the same step up to the order of summation. Does not know when to evaluate, to save or
to stop. Letters: B rows of a micro-batch, T positions, V vocabulary.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch

from twodice.dropout.attach import attach
from twodice.dropout.plan import DropoutPlan
from twodice.errors import ConfigError, TwodiceError
from twodice.random.keys import Key
from twodice.text.batches import BatchPlan
from twodice.text.store import TokenStore
from twodice.training.config import TrainConfig
from twodice.training.evaluate import IGNORED, StopAsked, nats, split_window
from twodice.training.init import reseed_net
from twodice.training.schedule import learning_rate

# One process for now. Every formula below holds for any number of ranks.
RANK, WORLD = 0, 1

Arithmetic = Callable[[], AbstractContextManager[Any]]


def choose_device(name: str) -> torch.device:
    """The device named in the settings; ``auto`` is the first accelerator there is, else the CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device must be auto, cpu, cuda, cuda:1, mps or the like; got {name!r}") from None
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(
            f"device must be one that is here; got {name!r} ({str(error).splitlines()[0]})"
        ) from None
    return device


def choose_dtype(name: str, device: torch.device) -> str:
    """``float32`` or ``bfloat16``; ``auto`` is bfloat16 where the device computes in it."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if device.type == "cpu" and _cpu_has_bfloat16() else "float32"


def _cpu_has_bfloat16() -> bool:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("flags"):
                return "amx_bf16" in line or "avx512_bf16" in line
    return False


def make_arithmetic(device: torch.device, dtype: str) -> Arithmetic:
    """A context for forward passes: autocast to bfloat16, or nothing."""
    if dtype == "bfloat16":
        return lambda: torch.autocast(device_type=device.type, dtype=torch.bfloat16)
    return contextlib.nullcontext


def make_optimizer(model: torch.nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019); the decay is on matrices only, not on biases and norms."""
    settings = config.optimizer
    assert settings.lr is not None, "the learning rate is resolved before the first step"
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        fused=device.type in ("cpu", "cuda", "mps"),
    )


class TrainingStep:
    """Everything that a step needs, made once; calling it does step `step` and returns its loss.

    Parameters
    ----------
    config
        As resolved.
    store
        The tokens.
    model
        On its device; its weights are changed by each call.
    device, arithmetic
        Where, and in which context the forward passes run.

    Randomness
    ----------
    Order of the data: ``Key(seed).child("data")``. Masks: the sites' keys at this seed and
    ``dropout_draw``, (step, example, position, column). Random calls of the model outside the plan:
    ``Key(seed)`` by `reseed_net`.
    """

    def __init__(
        self,
        config: TrainConfig,
        store: TokenStore,
        model: torch.nn.Module,
        device: torch.device,
        arithmetic: Arithmetic,
    ) -> None:
        assert config.steps is not None and config.batch is not None and config.context is not None
        self.config, self.model, self.device, self.arithmetic = config, model, device, arithmetic
        self.key = Key(config.seed)
        self.split = store.splits["train"]
        self.context, self.steps = config.context, config.steps
        self.order = BatchPlan(self.split.num_windows(self.context), config.batch, self.key.child("data"))
        self.optimizer = make_optimizer(model, config, device)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.rows = config.batch // (config.accumulate * WORLD)
        self.examples = [
            (micro * WORLD + RANK) * self.rows + torch.arange(self.rows, device=device)
            for micro in range(config.accumulate)
        ]
        self.handle: Any = None
        plan = DropoutPlan.parse(config.dropout)
        # A model without dropout is left untouched: no site is asked in any forward.
        if plan != DropoutPlan.parse("none"):
            self.handle = attach(model, plan, config.seed, total_steps=config.steps)

    def rate(self, step: int) -> float:
        """The learning rate of this step."""
        settings = self.config.optimizer
        assert settings.lr is not None and settings.min_lr is not None and settings.warmup is not None
        return learning_rate(
            step,
            steps=self.steps,
            peak=settings.lr,
            floor=settings.min_lr,
            warmup=settings.warmup,
            schedule=settings.schedule,
        )

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of the global batch of a step, on the CPU: a pure function of (seed, step)."""
        indices = self.order.indices(step)
        tokens = torch.from_numpy(self.split.windows(indices, self.context))
        return split_window(tokens, self.split.loss_mask(indices, self.context))

    def gradients(self, step: int, stop: Callable[[], bool]) -> torch.Tensor:
        """Leave the gradient of the mean loss of the global batch in the parameters, and return that loss
        [nats/token].

        The nats of all micro-batches are summed and divided once, by the number of targets of the whole
        batch.

        Raises
        ------
        StopAsked
            `stop` became true between two micro-batches; no weight has changed.
        """
        inputs, targets = self.batch(step)
        count = max(1, int((targets != IGNORED).sum()))
        inputs, targets = inputs.to(self.device), targets.to(self.device)
        total = torch.zeros((), device=self.device)
        self.optimizer.zero_grad(set_to_none=True)
        for micro, examples in enumerate(self.examples):
            if stop():
                raise StopAsked
            mine = slice((micro * WORLD + RANK) * self.rows, (micro * WORLD + RANK + 1) * self.rows)
            reseed_net(self.key, step, micro, RANK)
            with self.masks(step, examples):
                with self.arithmetic():
                    logits_BTV = self.model(input_ids=inputs[mine], use_cache=False).logits
                loss = nats(logits_BTV, targets[mine]) / count
                loss.backward()
            total += loss.detach()
        return total

    def masks(self, step: int, examples: torch.Tensor) -> AbstractContextManager[Any]:
        """The context in which the masks of this step and these rows are in force."""
        if self.handle is None:
            return contextlib.nullcontext()
        entered: AbstractContextManager[Any] = self.handle.step(
            step, examples=examples, draw=self.config.dropout_draw
        )
        return entered

    def __call__(self, step: int, stop: Callable[[], bool]) -> float:
        """Do step `step`, in [0, steps), and return the training loss before it [nats/token].

        Raises
        ------
        TwodiceError
            The loss or a gradient is not finite; no weight has changed.
        StopAsked
            As in `gradients`.
        """
        loss = self.gradients(step, stop)
        clip = self.config.optimizer.clip
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, math.inf if clip is None else clip)
        value = float(loss)
        if not (math.isfinite(value) and math.isfinite(float(norm))):
            raise TwodiceError(
                f"the loss and its gradient must be finite; at step {step} the loss is {value:g} and the "
                f"gradient's norm {float(norm):g}; a smaller optimizer.lr or optimizer.clip may help"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        self.optimizer.step()
        return value

    def observe(self, record: Mapping[str, Any]) -> None:
        """Tell a logged record to the plan's schedules: those that follow the validation loss hear that of
        validation A.
        """
        if self.handle is not None and record["kind"] == "evaluation":
            self.handle.observe(record["step"], record["validation_a_nats_per_token"])

    def close(self) -> None:
        """Take dropout out of the model again."""
        if self.handle is not None:
            self.handle.detach()
            self.handle = None

    def moments(self) -> dict[str, torch.Tensor]:
        """The optimizer's state as tensors by name, for a checkpoint; the tensors themselves."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        return {
            f"{part}.{names[id(parameter)]}": value
            for parameter, state in self.optimizer.state.items()
            for part, value in state.items()
        }

    def put_moments(self, moments: dict[str, torch.Tensor]) -> None:
        """Set the optimizer's state from what `moments` gave."""
        order = {name: i for i, name in enumerate(self._ordered_names())}
        state: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in moments.items():
            part, _, parameter = name.partition(".")
            state.setdefault(order[parameter], {})[part] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    def _ordered_names(self) -> list[str]:
        names = {id(p): name for name, p in self.model.named_parameters()}
        return [names[id(p)] for p in self.parameters]

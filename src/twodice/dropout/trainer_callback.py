"""The dropout of a plan inside the ``Trainer`` of transformers: attach, enter each step, take out.

The only file that is about the Trainer, and the only one here that imports transformers at its top; it is
imported when it is used. Masks are a function of the step's number and of each row's slot in the global
batch, so that a run that was killed goes on with the masks of one that was not, and nothing of ours is in a
checkpoint but the plan's text and the seed.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from twodice.dropout.attach import attach
from twodice.dropout.handle import Handle
from twodice.dropout.plan import DropoutPlan
from twodice.errors import ConfigError, ContractError


class DropoutCallback(TrainerCallback, ExportableState):
    """Puts the dropout of a plan into the model that a ``Trainer`` trains.

    Parameters
    ----------
    plan : DropoutPlan, text, mapping or path
        Which sites, which rate, on which schedule.
    seed : int
        Seed of the masks, in [-2^63, 2^64); not the Trainer's.
    rows : int, optional
        The most rows of one forward on one rank, 1 or more. Default: the Trainer's batch size on a device. A
        trainer whose batch has more rows than examples must name it: ``2 * per_device_train_batch_size`` for
        the pairs of preference training.
    metric : str
        Name of the validation loss that schedules which follow one (`plateau`) are told.
    reference : nn.Module, optional
        A frozen model of the same architecture, run in the same steps, that is to get the same masks
        (preference training). It is in train mode while a step lasts. Adapters need none: there the model
        itself is the reference, and its second forward in a step has the masks of the first.

    Attributes
    ----------
    handle : Handle or None
        The attached model's, from the beginning of training to its end.

    Raises
    ------
    ConfigError
        A plan or number that is none. When training begins: several devices in one process
        (``nn.DataParallel``), ranks that share rows (tensor, context or sequence parallel), a checkpoint of
        another plan or seed, a plan that follows a validation loss in a run that measures none.
    ContractError
        When training begins: a model that is attached already.

    Notes
    -----
    A step is entered for each forward and backward of a micro-batch, and left before the optimizer's step, so
    evaluation, generation and saving see the plain model. Activation checkpointing needs nothing. A run that
    stops with an error leaves the model attached; `close` takes it out, and so does the next ``train()``.

    *Randomness.* The step of a decision is ``state.global_step`` before the update; the example is
    ``(micro * world + rank) * rows + arange(B)`` with `micro` the number of the micro-batch in its step. For
    one order of the data this is the same for any number of ranks and any accumulation whose product is the
    same, as long as no batch is cut short at the end of an epoch.

    Examples
    --------
    >>> from transformers import Trainer  # doctest: +SKIP
    >>> Trainer(model, args, callbacks=[DropoutCallback("residual=0.1", seed=7)])  # doctest: +SKIP
    """

    def __init__(
        self,
        plan: DropoutPlan | str | Mapping[str, Any] | Path,
        seed: int = 0,
        *,
        rows: int | None = None,
        metric: str = "eval_loss",
        reference: nn.Module | None = None,
    ) -> None:
        if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
            raise ConfigError(f"rows must be an integer of 1 or more; got {rows!r}")
        self.plan = DropoutPlan.parse(plan)
        self.seed = seed
        self.rows = rows
        self.metric = metric
        self.reference = reference
        self.handle: Handle | None = None
        self._reference_handle: Handle | None = None
        self._inside: ExitStack | None = None
        self._micro = 0
        self._rows = 0
        self._unheard: set[str] = set()

    # The text form says all of a plan, and only one schedule reads losses.
    @property
    def _follows(self) -> bool:
        return "plateau(" in str(self.plan)

    def state(self) -> dict[str, Any]:
        """Return what the Trainer writes into its checkpoint: the settings, and nothing that changes."""
        args = {"plan": str(self.plan), "seed": self.seed, "rows": self.rows, "metric": self.metric}
        return {"args": args, "attributes": {}}

    def close(self) -> None:
        """Leave the step, if one is open, and take the dropout out. A second call does nothing."""
        self._leave()
        for handle in (self._reference_handle, self.handle):
            if handle is not None:
                handle.detach()
        self.handle = self._reference_handle = None

    # What the Trainer calls, in its order.

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach."""
        self.close()
        _refuse(args, kwargs["model"])
        self._refuse_another(state)
        if self._follows and str(getattr(args.eval_strategy, "value", args.eval_strategy)) == "no":
            raise ConfigError(
                f"the plan {str(self.plan)!r} follows a validation loss; got eval_strategy='no'; set "
                "eval_strategy='steps' or 'epoch' and an eval_dataset"
            )
        self._rows = self.rows if self.rows is not None else state.train_batch_size
        total = state.max_steps if state.max_steps > 0 else None
        self.handle = attach(kwargs["model"], self.plan, self.seed, total_steps=total)
        if self.reference is not None:
            try:
                self._reference_handle = attach(
                    self.reference, self.plan, self.seed, total_steps=total, share=self.handle
                )
            except BaseException:
                self.close()
                raise
        # A checkpoint from before this callback has no place for it, and the Trainer writes into it by name.
        state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        self._unheard = set()
        self._listen(state)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Enter the step for its first micro-batch."""
        if self._follows and self._unheard:
            raise ConfigError(
                f"the plan {str(self.plan)!r} follows {self.metric!r}, which an evaluation must give; got "
                f"{', '.join(sorted(self._unheard))}; pass DropoutCallback(..., metric=...)"
            )
        self._micro = 0
        self._enter(args, state)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Enter the step anew for its next micro-batch."""
        self._leave()
        self._micro += 1
        self._enter(args, state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the step: forward and backward are done."""
        self._leave()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the step, where the optimizer's was left out."""
        self._leave()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the step, where training was told to stop in the middle of it."""
        self._leave()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hand on the validation loss."""
        if self.handle is None:
            return
        measured = {name for name in kwargs.get("metrics") or {} if name.endswith("loss")}
        self._unheard = set() if self.metric in measured or self._heard(state) else self._unheard | measured
        self._listen(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the dropout out."""
        self.close()

    # The parts.

    def _enter(self, args: Any, state: Any) -> None:
        assert self.handle is not None
        start = (self._micro * args.world_size + args.process_index) * self._rows
        slots = torch.arange(start, start + self._rows)

        def examples(rows: int) -> torch.Tensor:
            if rows > len(slots):
                raise ContractError(
                    f"a forward must have at most the rows of one micro-batch on one rank, {len(slots)}; "
                    f"got {rows}; pass DropoutCallback(..., rows={rows})"
                )
            return slots[:rows]

        with ExitStack() as stack:
            stack.enter_context(self.handle.step(state.global_step, examples=examples))
            if self._reference_handle is not None:
                assert self.reference is not None
                for module in self.reference.modules():
                    stack.callback(setattr, module, "training", module.training)
                self.reference.train()
                stack.enter_context(self._reference_handle.step(state.global_step, examples=examples))
            self._inside = stack.pop_all()

    def _leave(self) -> None:
        inside, self._inside = self._inside, None
        if inside is not None:
            inside.close()

    def _heard(self, state: Any) -> bool:
        return any(self.metric in entry and entry["step"] == state.global_step for entry in state.log_history)

    def _listen(self, state: Any) -> None:
        """Tell all losses that are logged, those before a checkpoint too; the handle takes each once."""
        if self.handle is None or not self._follows:
            return
        for entry in state.log_history:
            if self.metric in entry:
                for handle in (self.handle, self._reference_handle):
                    if handle is not None:
                        handle.observe(entry["step"], entry[self.metric])

    def _refuse_another(self, state: Any) -> None:
        """Refuse a checkpoint that was written with other settings: its run would not be gone on with."""
        if state.global_step == 0:
            return
        stored = (state.stateful_callbacks or {}).get(type(self).__name__)
        if not isinstance(stored, dict):
            return
        for name in ("plan", "seed", "metric"):  # not rows: another layout of the same batch goes on
            ours = self.state()["args"][name]
            theirs = stored["args"].get(name, ours)
            if theirs != ours:
                raise ConfigError(
                    f"a resumed run must have the dropout of its checkpoint: there {name} is {theirs!r}; got "
                    f"{ours!r}; to go on with another, load the checkpoint's weights and begin a new run"
                )


def _refuse(args: Any, model: nn.Module) -> None:
    if args.n_gpu > 1:
        raise ConfigError(
            f"one process must train on one device; got {args.n_gpu} (the Trainer uses nn.DataParallel); "
            "start it with torchrun, or show it one device"
        )
    shared = getattr(args, "parallelism_config", None)
    for holder, name in ((shared, "tp_size"), (shared, "cp_size"), (shared, "sp_size"), (model, "tp_size")):
        size = getattr(holder, name, None)
        if size is not None and size > 1:
            raise ConfigError(
                f"each rank must have rows of its own; got {name}={size}, where ranks share them; not served "
                "yet: use data-parallel ranks (DDP, FSDP)"
            )

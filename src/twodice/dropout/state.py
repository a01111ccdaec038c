"""The state of one attachment: its sites, the step that is open, and what a step switches while it lasts.

Own dropout goes off, stand-ins for forwards come in, and the recomputation of a checkpoint re-enters the
frame of its forward; all of it is put back when the step ends. Holds the model weakly. Knows no hook.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from twodice.dropout.plan import DropoutPlan
from twodice.dropout.schedules import Schedule
from twodice.dropout.sites import Inventory
from twodice.dropout.step import Frame, Keys, Snapshot
from twodice.errors import ContractError
from twodice.random.thresholds import round_rate

if TYPE_CHECKING:
    from twodice.dropout.site import Site

_ABSENT = object()


class State:
    """Everything about one attachment that the hooks see. Holds the model weakly."""

    def __init__(
        self, inventory: Inventory, plan: DropoutPlan, seed: int, total_steps: int | None, name: str
    ) -> None:
        self.root = weakref.ref(inventory.root)
        self.model_name = type(inventory.root).__name__
        self.plan = plan
        self.seed = seed
        self.total_steps = total_steps
        self.name = name
        #: Sites that can drop, and all that the plan speaks of (a rate of 0 among them).
        self.sites: list[Site] = []
        self.all_sites: list[Site] = []
        self.spoken: set[str] = set()
        self.snapshot: Snapshot | None = None
        self.frame: Frame | None = None
        self._keys: dict[int, Keys] = {}
        #: Validation losses by rising step, for schedules that follow them.
        self.losses: list[tuple[int, float]] = []
        self.attached = True
        #: Whether Monte Carlo draws run: sites drop although the model is in eval mode.
        self.drawing = False
        #: What is changed while a step runs: (mapping, name, value inside), and the same for hooks of the
        #: step alone.
        self.switches: list[tuple[MutableMapping[Any, Any], Any, Any]] = []
        self.saved: list[tuple[MutableMapping[Any, Any], Any, Any]] = []
        self.layers: list[dict[str, Any]] = []
        #: Called when a step begins.
        self.preparations: list[Callable[[], None]] = []

    def snapshot_of(
        self,
        step: int | torch.Tensor,
        draw: int,
        rates: Callable[[Schedule], float],
        examples: Any,
        positions: dict[str | None, torch.Tensor],
    ) -> Snapshot:
        """Return the snapshot of a step, with a rate for each schedule."""
        in_force = {
            schedule: round_rate(rates(schedule)) for schedule in {site.schedule for site in self.sites}
        }
        if draw not in self._keys:
            self._keys[draw] = Keys(self.seed, draw, [site.key_name for site in self.sites])
        thresholds = tuple(in_force[site.schedule] for site in self.sites)
        return Snapshot(
            step, self._keys[draw], examples, positions, thresholds,
            torch.tensor(thresholds, dtype=torch.int64), torch.as_tensor(step),
        )  # fmt: skip

    def lost(self, where: str) -> NoReturn:
        """Raise: a part of the model runs in train mode and no forward of the root is under way."""
        raise ContractError(
            f"{where!r} runs in train mode outside a forward of the attached {self.model_name} inside a "
            "step: its masks are not defined. In a recomputation (activation checkpointing of your own) pass "
            "context_fn=handle.recompute to torch.utils.checkpoint.checkpoint; else call the whole model "
            "inside 'with handle.step(step, examples=...):', or put the part into eval()"
        )

    def switch_on(self) -> None:
        """Put what a step changes in force: own dropout off, attention by our function, checkpoints that
        re-enter.
        """
        saved = self.saved
        assert not saved
        for prepare in self.preparations:
            prepare()
        for mapping, name, value in self.switches:
            saved.append((mapping, name, mapping.get(name, _ABSENT)))
            mapping[name] = value
        for layer in self.layers:
            if layer.get("gradient_checkpointing") and "_gradient_checkpointing_func" in layer:
                saved.append((layer, "_gradient_checkpointing_func", layer["_gradient_checkpointing_func"]))
                layer["_gradient_checkpointing_func"] = _reentering(
                    self, layer["_gradient_checkpointing_func"]
                )
            elif "checkpoint_fn" in layer:
                saved.append((layer, "checkpoint_fn", layer["checkpoint_fn"]))
                layer["checkpoint_fn"] = _reentering(self, layer["checkpoint_fn"])

    def switch_off(self) -> None:
        """Put back what `switch_on` changed."""
        for mapping, name, value in reversed(self.saved):
            if value is _ABSENT:
                mapping.pop(name, None)
            else:
                mapping[name] = value
        self.saved.clear()

    @contextmanager
    def repeating(self, frame: Frame, visits: tuple[int, ...]) -> Iterator[None]:
        """Re-enter a frame, for the recomputation of a part of its forward."""
        root = self.root()
        if not self.attached or root is None:
            raise ContractError(
                "the model was detached between a forward and its backward pass; detach after it"
            )
        if not (root.training or self.drawing):
            raise ContractError(
                "the model was put into eval() between a forward and its backward pass, which computes "
                "parts of it again; run backward first"
            )
        before, outside = self.frame, self.snapshot is None and not self.saved
        if outside:
            self.switch_on()
        self.frame = frame.repeated(visits)
        try:
            yield
        finally:
            self.frame = before
            if outside:
                self.switch_off()

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise ContractError("a model cannot be copied inside a step; copy it outside")


def _reentering(state: State, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Return a checkpoint function whose recomputation re-enters the frame of its forward."""

    def checkpointed(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        frame = state.frame
        if frame is None:
            return checkpoint(function, *args, **kwargs)
        if torch.compiler.is_compiling():
            # Seen with fullgraph=True alone; else the compiler leaves this call to Python, and all is well.
            raise ContractError(
                "a checkpoint inside an attached model must break the graph, because its recomputation "
                "re-enters the step in Python; got fullgraph=True; leave it out, or switch checkpointing off"
            )
        visits = tuple(frame.visits)
        # A stream that was kept outside may be an argument here; the recomputation has another tensor for it.
        kept = [
            (site, next((i for i, value in enumerate(args) if value is stream), None), stream)
            for site, stream in frame.streams.items()
        ]
        first = True

        def run(*inputs: Any, **named: Any) -> Any:
            nonlocal first
            if first:
                first = False
                return function(*inputs, **named)
            with state.repeating(frame, visits):
                assert state.frame is not None
                for site, place, stream in kept:
                    state.frame.streams[site] = stream if place is None else inputs[place]
                return function(*inputs, **named)

        return checkpoint(run, *args, **kwargs)

    return checkpointed

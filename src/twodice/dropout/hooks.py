"""What runs inside an attached model: sites, hooks, and what a step switches in the model while it lasts.

The root's forward opens a frame; each site drops by its key and the frame; the recomputation of a checkpoint
re-enters the frame of its forward. Knows the kernels only through `kernels.dropout`, and the search for sites
not at all.

Letters: B rows, T positions, C columns.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import nn

from twodice.dropout.plan import DropoutPlan, Entry
from twodice.dropout.schedules import Schedule
from twodice.dropout.sites import Inventory, Place, first_tensor
from twodice.dropout.step import Frame, Keys, Snapshot, open_frame, set_rows
from twodice.errors import ContractError, ShapeError
from twodice.kernels.dropout import dropout
from twodice.kernels.noise import noisy
from twodice.kernels.noise_form import UNIT, Noise
from twodice.random.keys import Key
from twodice.random.thresholds import round_rate

_ABSENT = object()
_AXES = {"bc": 2, "btc": 3, "bhts": 4, "tbc": 3, "nc": 2, "bct": 3, "bchw": 4}


class Site:
    """A place that drops: its name, its number in the snapshot, its schedule, its noise and its keys."""

    def __init__(self, state: State, index: int, place: Place, entry: Entry, schedule: Schedule) -> None:
        self.state = state
        self.index = index
        self.name = place.name
        #: What the key is derived from; tied weights that share a mask share it.
        self.key_name = place.name
        self.layout = place.layout
        self.kind = place.kind
        self.layer = place.layer
        self.stack = place.stack
        self.entry = entry
        self.schedule = schedule
        self.noise = place.extra.get("noise", entry.form)

    def enter(
        self, frame: Frame, *, whole: bool = False
    ) -> tuple[int | torch.Tensor, int | torch.Tensor, Key | torch.Tensor]:
        """Count a visit; return its threshold, the step and its key.

        Under the compiler all are tensors, so that no rate, step or draw recompiles; but a `whole` key is one
        from which others can be derived, and a constant of the graph.
        """
        snapshot, index = frame.snapshot, self.index
        visit = frame.visits[index]
        frame.visits[index] = visit + 1
        if torch.compiler.is_compiling():
            keys = snapshot.keys
            key = keys.of(index, visit) if whole else keys.tensor_of(index, visit)
            return snapshot.rates[index], snapshot.step_tensor, key
        return snapshot.thresholds[index], snapshot.step, snapshot.keys.of(index, visit)

    def drop(
        self,
        frame: Frame,
        x: torch.Tensor,
        key_positions: torch.Tensor | None = None,
        *,
        positions: torch.Tensor | None = None,
        noise: Noise | None = None,
        examples: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return `x` with the units dropped that the frame's step names at this site.

        `positions`, `noise` and `examples` stand in for those of the frame and the site where a kind has its
        own.
        """
        rate, step, key = self.enter(frame)
        if isinstance(rate, int) and rate == 0:
            return x
        layout = self.layout
        if layout is None:
            layout = {2: "bc", 3: "btc"}.get(x.dim())
        if layout is None or x.dim() != _AXES[layout]:
            self.misfit(frame, x)
        rows = frame.rows
        if rows is not None and layout != "nc" and x.shape[layout == "tbc"] != rows:
            self.misfit(frame, x)
        if examples is None:
            examples = frame.examples
        if positions is None:
            positions = frame.positions.get(self.stack)
        if layout == "nc":
            if rows is None or x.shape[0] % rows:
                self.misfit(frame, x)
            length = x.shape[0] // rows
            if positions is None:
                positions = torch.arange(length, device=x.device)[None]
            positions = positions.expand(rows, length)
            if examples is None:
                examples = torch.arange(rows, device=x.device)
            if examples.dim() == 1:
                examples = examples[:, None].expand(rows, length)
            if isinstance(step, torch.Tensor) and step.dim():
                step = step[:, None].expand(rows, length).reshape(-1)
        elif positions is not None:
            if layout == "bc":
                positions = None
            else:
                T = x.shape[{"bhts": 2, "tbc": 0, "bct": 2}.get(layout, 1)]
                if positions.shape[1] != T and layout != "bchw":
                    raise ShapeError(
                        f"positions must be (B, T) with the T of the tensor at site {self.name!r}, whose "
                        f"shape is {tuple(x.shape)}; got {tuple(positions.shape)}"
                    )
        if noise is None:
            noise = self.noise
        if noise != UNIT or (isinstance(step, torch.Tensor) and step.dim()):
            return noisy(
                x, rate, key, step, noise=noise,
                examples=examples, positions=positions, key_positions=key_positions, layout=layout,
            )  # fmt: skip
        return dropout(
            x, rate, key, step,
            examples=examples, positions=positions, key_positions=key_positions, layout=layout,
        )  # fmt: skip

    def apply(self, frame: Frame, x: torch.Tensor) -> torch.Tensor:
        """Drop in a module's input or output; a kind may say here what one decision counts for."""
        return self.drop(frame, x)

    def apply_weight(self, frame: Frame, weight: torch.Tensor, turned: bool) -> torch.Tensor:
        """Return a weight (output units, input units), or turned, with entries dropped."""
        rate, step, key = self.enter(frame)
        if isinstance(rate, int) and rate == 0:
            return weight
        if turned:
            return dropout(weight.t(), rate, key, step, layout="bc").t()
        return dropout(weight.flatten(1), rate, key, step, layout="bc").view_as(weight)

    def misfit(self, frame: Frame, x: torch.Tensor) -> NoReturn:
        """Say what shape came to this site and what must have come."""
        wanted = "(B, T, C) or (B, C)" if self.layout is None else f"axes {self.layout!r}"
        rows = "" if frame.rows is None else f" with B = {frame.rows}, the rows of the model's input"
        raise ShapeError(
            f"the tensor at site {self.name!r} must be {wanted}{rows}; got shape {tuple(x.shape)}; leave "
            "this site out of the plan, or use twodice.dropout with a layout of your own"
        )


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


class Inert:
    """What a hook becomes in a deep copy: nothing."""

    def __call__(self, *_: Any, **__: Any) -> None:
        return None


class Hook:
    """Base of our hooks, so that they are known by type and turn inert in a deep copy."""

    def __init__(self, state: State) -> None:
        self.state = state

    def rests(self, module: nn.Module) -> bool:
        """Whether a module in this mode drops nothing."""
        return not (module.training or self.state.drawing)

    def __deepcopy__(self, memo: dict[Any, Any]) -> Inert:
        if self.state.saved:
            raise ContractError("a model cannot be copied inside a step; copy it outside")
        if "twodice" not in memo:
            memo["twodice"] = True
            warnings.warn(
                "the deep copy of an attached model is detached: it has no dropout of the plan; attach it "
                "if it is to train",
                UserWarning,
                stacklevel=2,
            )
        return Inert()

    def __reduce__(self) -> NoReturn:
        raise ContractError(
            "an attached model cannot be pickled; save its state_dict, or call handle.detach() first"
        )


class Reader:
    """Reads the rows and the positions of a forward of one stack from its arguments."""

    def __init__(self, names: list[str], stack: str | None = None, time_first: bool = False) -> None:
        self.names = names
        self.stack = stack
        self.time_first = time_first

    def argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The argument of that name, given by name or by place; None where there is none."""
        if name in kwargs:
            return kwargs[name]
        place = self.names.index(name) if name in self.names else len(args)
        return args[place] if place < len(args) else None

    def read(self, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Set the rows and positions of a frame."""
        frame.entered.append(self.stack)
        tokens = self.argument("input_ids", args, kwargs)
        if tokens is None:
            tokens = self.argument("inputs_embeds", args, kwargs)
        if tokens is None:
            tokens = first_tensor(args, kwargs)
            if tokens is not None and tokens.dim() > self.time_first:
                set_rows(frame, tokens.shape[int(self.time_first)])
            return
        set_rows(frame, tokens.shape[0])
        if self.stack in frame.positions:
            return
        positions = self.argument("position_ids", args, kwargs)
        if positions is not None:
            positions = positions if positions.dim() == 2 else positions[None]
            _refuse_packed(frame, positions)
            frame.positions[self.stack] = positions
            return
        cache = self.argument("past_key_values", args, kwargs)
        past = 0 if cache is None else int(cache.get_seq_length())
        # Nothing means 0 .. T-1; with a cache the positions stay absolute.
        if past:
            frame.positions[self.stack] = torch.arange(past, past + tokens.shape[1], device=tokens.device)[
                None
            ]


def _refuse_packed(frame: Frame, positions: torch.Tensor) -> None:
    """Two sequences in one row have equal positions: only examples for each token can tell them apart."""
    if torch.compiler.is_compiling() or (frame.examples is not None and frame.examples.dim() == 2):
        return
    if positions.shape[1] > 1 and bool((positions[:, 1:] < positions[:, :-1]).any()):
        raise ContractError(
            "a row whose positions start anew holds several sequences, which would get the same masks; enter "
            "the step with examples (B, T): a slot for each token"
        )


class RootHook(Hook):
    """Before the root's forward: outside a step nothing may train; inside, a frame is opened."""

    def __init__(self, state: State, readers: list[Reader], generates: bool, whole: bool) -> None:
        super().__init__(state)
        self.readers = readers
        self.generates = generates
        self.whole = whole

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = self.state
        if self.rests(module):
            return
        if self.generates and not torch.compiler.is_compiling() and _generating():
            raise ContractError(
                f"generate() must run in eval mode; the attached {state.model_name} is in train mode; call "
                "model.eval() first"
            )
        snapshot = state.snapshot
        if snapshot is None:
            raise ContractError(
                f"a forward in train mode must run inside a step; got one of {state.model_name} outside; "
                "write 'with handle.step(step, examples=...):' around forward and backward, or call "
                "model.eval()"
            )
        rows = None
        if self.whole:
            first = first_tensor(args, kwargs)
            rows = None if first is None or first.dim() == 0 else first.shape[0]
        frame = open_frame(snapshot, rows, len(state.sites))
        for reader in self.readers:
            reader.read(frame, args, kwargs)
        state.frame = frame


class RootEnd(Hook):
    """After the root's forward, also after an error: the frame is closed, and a lookup that was passed by is
    said.
    """

    def __init__(self, state: State) -> None:
        super().__init__(state)
        #: The sites of the kind ``word``, each with its lookup.
        self.lookups: list[tuple[Site, nn.Module]] = []

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        frame, self.state.frame = self.state.frame, None
        if frame is None or output is None:  # None: after an error
            return
        for site, lookup in self.lookups:
            passed_by = site.stack in frame.entered and not frame.visits[site.index]
            if passed_by and not self.rests(lookup):
                raise ContractError(
                    f"'word' drops in the lookup of the tokens; this forward of {self.state.model_name} did "
                    f"not come to the one at {site.name!r} (inputs_embeds?), so nothing would be dropped; "
                    "give input_ids, or leave 'word' out of the plan"
                )


class BaseHook(Hook):
    """Before the base model's forward, where that is not the root: its arguments tell rows and positions."""

    def __init__(self, state: State, reader: Reader) -> None:
        super().__init__(state)
        self.reader = reader

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.rests(module):
            return
        frame = self.state.frame
        if frame is None:
            self.state.lost(type(module).__name__)
        self.reader.read(frame, args, kwargs)


class GuardHook(Hook):
    """Before a module whose inside drops: it may not train outside a frame."""

    def __init__(self, state: State, name: str) -> None:
        super().__init__(state)
        self.name = name

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not self.rests(module) and self.state.frame is None:
            self.state.lost(self.name)


class InputHook(Hook):
    """Before a module: drop units of its first argument."""

    def __init__(self, state: State, site: Site) -> None:
        super().__init__(state)
        self.site = site

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.rests(module):
            return None
        frame = self.state.frame
        if frame is None:
            self.state.lost(self.site.name)
        if not args:
            raise ShapeError(
                f"the tensor at site {self.site.name!r} must be the first argument by place; got none"
            )
        return self.site.apply(frame, args[0]), *args[1:]


class OutputHook(Hook):
    """After a module: drop units of its result, or of the first of several."""

    def __init__(self, state: State, site: Site) -> None:
        super().__init__(state)
        self.site = site

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.rests(module):
            return None
        frame = self.state.frame
        if frame is None:
            self.state.lost(self.site.name)
        if isinstance(output, tuple):
            return self.site.apply(frame, output[0]), *output[1:]
        return self.site.apply(frame, output)


def _generating() -> bool:
    """Whether a ``generate`` of transformers is among the callers."""
    caller = sys._getframe(1)
    while caller is not None:
        code = caller.f_code
        if code.co_name == "generate" and "transformers" in code.co_filename:
            return True
        caller = caller.f_back  # type: ignore[assignment]
    return False

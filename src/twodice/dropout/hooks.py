"""The hooks of an attached model: the root's forward opens a frame, and each site drops by its key and the
frame.

Hooks are known by type, rest in eval, and turn inert in a deep copy. They know state and site, not the plan;
kinds that need more than a tensor and a mask are in `kinds`.

Letters: B rows, T positions.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any, NoReturn

import torch
from torch import nn

from twodice.dropout.site import Site
from twodice.dropout.sites import first_tensor
from twodice.dropout.state import State
from twodice.dropout.step import Frame, open_frame, set_rows
from twodice.errors import ContractError, ShapeError


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

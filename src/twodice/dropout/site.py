"""One place in an attached model that drops: how it comes to its threshold, step, key and coordinates.

Knows the kernels and the frame of a forward, neither hooks nor the search for sites.

Letters: B rows, T positions, C columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import torch

from twodice.dropout.places import Place
from twodice.dropout.plan import Entry
from twodice.dropout.schedules import Schedule
from twodice.dropout.step import Frame
from twodice.errors import ShapeError
from twodice.kernels.dropout import dropout
from twodice.kernels.noise import noisy
from twodice.kernels.noise_form import UNIT, Noise
from twodice.random.keys import Key

if TYPE_CHECKING:
    from twodice.dropout.state import State

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

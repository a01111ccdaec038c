"""Dropout as modules for people's own models: `Dropout`, `DropoutAdd`, and the `Step` that is handed to them.

A module holds a rate and a key and no other state: what it drops is a function of these and of the `Step`
that its forward is given, so activation checkpointing, compiled code and a second forward before the backward
pass need no care. Models that hold ``torch.nn.Dropout``, or whose forward cannot be changed, take
`twodice.attach`. Knows the functions of `twodice.dropout` only.

Letters: B rows, T positions, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from twodice.dropout.functional import dropout, dropout_add
from twodice.errors import ConfigError, ContractError, nearest
from twodice.kernels.dropout_layout import LAYOUTS
from twodice.kernels.noise import Noise
from twodice.random.draws import threshold
from twodice.random.keys import Key

__all__ = ["Dropout", "DropoutAdd", "Step"]


class Step:
    """What the masks of one forward are a function of, beside the rate and the key of each module.

    Make one for each forward and pass it down to the modules. It copies what it is given and does not change.

    Parameters
    ----------
    step : int, or int64 tensor () or (B,)
        The training step, in [0, 2^32); with (B,) one number for each row.
    examples : int64 tensor (B,) or (B, T), optional
        Slot of each row in the *global* batch of the step, in [0, 2^32); default 0 .. B-1, which is right for
        one micro-batch on one rank. Otherwise ``(micro * world + rank) * B + arange(B)``.
    positions : int64 tensor (B, T) or (1, T), optional
        Position of each token, in [0, 2^32); default 0 .. T-1. Modules of layout ``bc``, which has no
        positions, take no notice.
    draw : int
        Which draw of masks within the step, in [0, 2^63); 0 is neutral. Another number drops other units at
        every module. A module that is called twice in one forward drops the same units twice, unless it is
        given another draw.

    Raises
    ------
    ConfigError
        If the draw is no such integer, or the step no number. A step outside its range is an error
        of the module that is called with it.

    Examples
    --------
    >>> import torch, twodice.nn
    >>> layer = twodice.nn.Dropout(0.5, key=7)
    >>> layer(torch.ones(1, 1, 8), twodice.nn.Step(17))
    tensor([[[2., 2., 0., 0., 0., 2., 0., 2.]]])
    """

    __slots__ = ("draw", "draw_tensor", "drawn", "examples", "positions", "step", "step_tensor")

    def __init__(
        self,
        step: int | torch.Tensor | Sequence[int],
        *,
        examples: torch.Tensor | Sequence[int] | None = None,
        positions: torch.Tensor | Sequence[Sequence[int]] | None = None,
        draw: int = 0,
    ) -> None:
        if isinstance(draw, bool) or not isinstance(draw, int) or not 0 <= draw < 2**63:
            raise ConfigError(f"a draw must be an integer in [0, 2^63); got {draw!r}")
        self.draw = draw
        #: For compiled code, which has one graph for draw 0, whose key is known, and one for all others.
        self.drawn = draw > 0
        self.draw_tensor = torch.tensor(draw, device="cpu")
        #: As a tensor, too: compiled code takes it from there, and is not compiled anew for each step.
        try:
            self.step_tensor = torch.as_tensor(step).clone()
        except (TypeError, ValueError, RuntimeError):
            raise ConfigError(
                f"step must be an integer, or a tensor of one for each row; got {step!r}"
            ) from None
        self.step = step if isinstance(step, int) else self.step_tensor
        self.examples = None if examples is None else torch.as_tensor(examples).clone()
        self.positions = None if positions is None else torch.as_tensor(positions).clone()

    def again(self, draw: int) -> Step:
        """Return the same step with another draw, for a second pass or a second visit of a
        module.
        """
        return Step(self.step, examples=self.examples, positions=self.positions, draw=draw)

    def __repr__(self) -> str:
        given = [f"{name}={getattr(self, name)!r}" for name in ("examples", "positions", "draw")]
        return f"Step({self.step!r}, {', '.join(given)})"


@torch.library.custom_op("twodice::draw_key", mutates_args=())
def _draw_key(draw: torch.Tensor, seed: str) -> torch.Tensor:
    """The key of a draw, hashed when the graph runs; the seed as text, for an integer there has 63 bits."""
    bits = Key(int(seed)).child("draw", int(draw)).value
    return torch.tensor(bits, dtype=torch.uint64, device="cpu").view(torch.int64)


@_draw_key.register_fake
def _(draw: torch.Tensor, seed: str) -> torch.Tensor:
    return torch.empty((), dtype=torch.int64, device="cpu")


class _Keyed(nn.Module):
    """What both modules hold: rate, key, layout, noise."""

    def __init__(
        self,
        p: float | torch.Tensor,
        *,
        key: Key | int,
        layout: str = "btc",
        noise: str | Noise = "unit",
    ) -> None:
        super().__init__()
        if not isinstance(p, torch.Tensor):
            threshold(p)
        if layout not in LAYOUTS:
            raise ConfigError(
                f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}{nearest(layout, LAYOUTS)}"
            )
        self.p = p
        self.key = key if isinstance(key, Key) else Key(key)
        self.layout = layout
        self.noise = Noise.parse(noise)

    def _at(self, at: Step | None) -> tuple[Key | torch.Tensor, int | torch.Tensor, Step]:
        """The key, the step and what else the masks of a call are a function of."""
        if not isinstance(at, Step):
            call = "x, residual" if isinstance(self, DropoutAdd) else "x"
            raise ContractError(
                f"{type(self).__name__} in train mode must be told the step, of which its masks are a "
                f"function; got {'none' if at is None else repr(at)}; write layer({call}, "
                "twodice.nn.Step(step, examples=...)), or call eval()"
            )
        compiling = torch.compiler.is_compiling()
        key: Key | torch.Tensor = self.key
        if at.drawn:
            own = self.key
            key = _draw_key(at.draw_tensor, str(own.seed)) if compiling else own.child("draw", at.draw)
        return key, at.step_tensor if compiling else at.step, at

    def _positions(self, at: Step) -> torch.Tensor | None:
        return None if self.layout == "bc" else at.positions

    def extra_repr(self) -> str:
        """What ``print(model)`` shows of it."""
        return f"p={self.p}, key={self.key}, layout={self.layout!r}, noise={str(self.noise)!r}"


class Dropout(_Keyed):
    """`twodice.dropout` as a module: the identity in eval mode.

    Parameters
    ----------
    p : float or 0-dim tensor
        Probability of *dropping*, in [0, 1]. It may be assigned anew (``layer.p = 0.2``); a schedule in
        compiled code keeps one tensor and writes into it.
    key : Key or int
        Names this place in the model. Two modules with one key drop the same units, so derive it from names:
        ``Key(seed).child("layers", 3, "mlp")``.
    layout : str
        What the axes of the input mean, as in `twodice.dropout`.
    noise : str or Noise
        As in `twodice.dropout`.

    Raises
    ------
    ConfigError
        If rate, key, layout or noise cannot be meant.
    ContractError
        In a forward in train mode without a `Step`.

    Notes
    -----
    *Randomness.* As in `twodice.dropout`, with the step, the examples and the positions of the `Step` that
    the forward is given, under the key itself for draw 0 and under ``key.child("draw", n)`` otherwise. The
    module has no parameters, no buffers and no generator: nothing of it is in a state_dict.

    Srivastava et al. 2014. Unlike `torch.nn.Dropout`, the forward takes a second argument.
    """

    def forward(self, x: torch.Tensor, at: Step | None = None) -> torch.Tensor:
        """Return `x` with units dropped at that step; in eval mode `x` itself."""
        if not self.training:
            return x
        key, step, at = self._at(at)
        return dropout(
            x,
            self.p,
            key=key,
            step=step,
            examples=at.examples,
            positions=self._positions(at),
            layout=self.layout,
            noise=self.noise,
        )


class DropoutAdd(_Keyed):
    """``residual + dropout(x)`` as a module, in one pass over memory; ``residual + x`` in eval mode.

    Parameters
    ----------
    p, key, layout, noise
        As in `Dropout`.

    Raises
    ------
    ConfigError, ContractError
        As in `Dropout`.
    ShapeError
        In a forward in train mode whose residual has not the shape and dtype of `x`.

    Notes
    -----
    *Randomness.* As in `Dropout`: with the same key it drops the same units.

    Vaswani et al. 2017, section 5.4: what a sublayer gives is dropped and then added to its input.

    Examples
    --------
    >>> import torch, twodice.nn
    >>> layer = twodice.nn.DropoutAdd(0.5, key=7)
    >>> layer(torch.ones(1, 1, 8), torch.ones(1, 1, 8), twodice.nn.Step(17))
    tensor([[[3., 3., 1., 1., 1., 3., 1., 3.]]])
    """

    def forward(self, x: torch.Tensor, residual: torch.Tensor, at: Step | None = None) -> torch.Tensor:
        """Return `residual` plus `x` with units dropped at that step."""
        if not self.training:
            return residual + x
        key, step, at = self._at(at)
        return dropout_add(
            x,
            residual,
            self.p,
            key=key,
            step=step,
            examples=at.examples,
            positions=self._positions(at),
            layout=self.layout,
            noise=self.noise,
        )

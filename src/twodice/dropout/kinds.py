"""The kinds of dropout that need more than a tensor and a mask: tokens, words, heads, weights, layers, the
skip path.

Each is a site or a hook of its own. Knows the frame and the site, not the plan. The plain kinds drop a
module's input or output by the hooks in `hooks`; D(x) = m x / (1 - p), where m is 0 with probability p, or 1:

- `embedding`: D(E + P), the sum of what was looked up and the positions, before the first layer (Vaswani et
  al. 2017, arXiv 1706.03762, section 5.4). A model whose positions enter in attention has no P.
- `residual`: x + D(f(x)), what a sublayer f adds to the stream (the same section; they normalise after the
  sum, others before f, which changes nothing here).
- `activation`: W D(a) + b, the units before the last matrix of the feed-forward (Srivastava et al. 2014, JMLR
  15, section 4: a layer reads the thinned outputs of the layer before. They scale at test time instead).
- `output`: D(norm(x)), what enters the softmax layer (Zaremba et al. 2014, arXiv 1409.2329, drop the input
  and output of each recurrent layer so; Merity et al. 2017, arXiv 1708.02182, with one mask for all
  positions: `output:feature`).

Letters: B rows, T positions, C columns, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from twodice.dropout.hooks import Hook
from twodice.dropout.site import Site
from twodice.dropout.state import State
from twodice.dropout.step import Frame
from twodice.errors import ShapeError
from twodice.kernels.noise_form import Noise
from twodice.random.draws import lanes
from twodice.random.keys import Key


class TokenSite(Site):
    """Whole input tokens: one decision for each position of an example, for all columns at once.

    The decision is that of column 0. Tokens that are dropped are zero at the input of the first layer and
    the others are scaled; Gao et al. 2025 (arXiv 2510.04071) study it, without the scale, as token dropout.
    """

    def apply(self, frame: Frame, x: torch.Tensor) -> torch.Tensor:
        """Return `x` (B, T, C) with whole positions dropped."""
        return self.drop(frame, x, noise=Noise(block=x.shape[-1]))


class HeadSite(Site):
    """Whole heads at the input of the output projection (DropHead: Zhou et al. 2020, arXiv 2004.13342).

    One decision for each example and head, the same at every position. The paper rescales by the number of
    heads that stayed; here, as everywhere, by 1 / (1 - p), so that the mean is exact.
    """

    heads: int

    def apply(self, frame: Frame, x: torch.Tensor) -> torch.Tensor:
        """Return `x` (B, T, H * K) with whole heads dropped."""
        width, rest = divmod(x.shape[-1], self.heads)
        if rest:
            raise ShapeError(
                f"the tensor at site {self.name!r} must have a multiple of {self.heads} columns; got shape "
                f"{tuple(x.shape)}"
            )
        return self.drop(frame, x, noise=Noise(locked=True, block=width))


class LookupHook(Hook):
    """After the lookup of the input tokens: drop whole word types, wherever they stand in an example.

    Gal and Ghahramani 2016 (arXiv 1512.05287), section 4.2: the mask belongs to the word and not to the
    place, so the position of a decision is the token's number. They draw one mask a sequence, as here;
    AWD-LSTM (Merity et al. 2017) one a batch.
    """

    def __init__(self, state: State, site: Site) -> None:
        super().__init__(state)
        self.site = site

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        if self.rests(module):
            return None
        frame = self.state.frame
        if frame is None:
            self.state.lost(self.site.name)
        return self.site.drop(frame, output, positions=args[0], noise=Noise(block=output.shape[-1]))


class ChannelSite(Site):
    """Whole channels behind an ``nn.Dropout2d`` or its kin: one decision for each example and channel.

    Tompson et al. 2015 (arXiv 1411.4280), "spatial dropout".
    """

    def apply(self, frame: Frame, x: torch.Tensor) -> torch.Tensor:
        """Return `x` (B, C, T) or (B, C, H, W) with whole channels dropped."""
        return self.drop(frame, x, noise=Noise(self.noise.form, True, self.noise.block))


class ProbabilitiesHook(Hook):
    """After an ``nn.Dropout`` that a model without an attention interface calls on its weights (B, H, T, S).

    The column of a decision is the position of the key: that of the query with the same number, where there
    is one, else its place in the row.
    """

    def __init__(self, state: State, site: Site) -> None:
        super().__init__(state)
        self.site = site

    def __call__(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        if self.rests(module):
            return None
        frame = self.state.frame
        if frame is None:
            self.state.lost(self.site.name)
        positions = frame.positions.get(self.site.stack)
        keys = positions if positions is not None and positions.shape[1] == output.shape[-1] else None
        return self.site.drop(frame, output, key_positions=keys)


class WeightHook(Hook):
    """Before a module: its weight with entries dropped, for this one call (DropConnect).

    Wan et al. 2013: one mask for the batch. The example of a decision is the output unit, the column the
    input unit. The dropped tensor stands in the module's ``__dict__``, where Python finds it before the
    parameter; `WeightEnd` takes it away, so that state_dict and the optimizer never see it.
    """

    def __init__(self, state: State, site: Site, holder: nn.Module, name: str, turned: bool) -> None:
        super().__init__(state)
        self.site = site
        self.holder = holder
        self.name = name
        self.turned = turned

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self.rests(module):
            return
        frame = self.state.frame
        if frame is None:
            self.state.lost(self.site.name)
        weight = self.holder._parameters[self.name]
        assert weight is not None
        self.holder.__dict__[self.name] = self.site.apply_weight(frame, weight, self.turned)


class WeightEnd(Hook):
    """After the module, also after an error: the parameter itself again."""

    def __init__(self, state: State, holder: nn.Module, name: str) -> None:
        super().__init__(state)
        self.holder = holder
        self.name = name

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        self.holder.__dict__.pop(self.name, None)


class StreamHook(Hook):
    """Before the module whose input is the residual stream: keep the stream for the skip site."""

    def __init__(self, state: State, site: Site) -> None:
        super().__init__(state)
        self.site = site

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.rests(module) and self.state.frame is not None:
            self.state.frame.streams[self.site.index] = _first(args, kwargs, self.site.name)


class SkipHook(Hook):
    """After a sublayer: the identity path beside it is dropped, the branch is not.

    The reading of "Residual Dropout" (SIGUL 2024) as ``Dropout(x) + f(x)``; Vaswani et al. 2017 drop the
    branch instead (kind `residual`). The model itself adds x later, so the branch is given ``f + (Dropout(x)
    - x)``: the sum is right up to the rounding of one addition.
    """

    def __init__(self, state: State, site: Site) -> None:
        super().__init__(state)
        self.site = site

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self.rests(module):
            return None
        frame = self.state.frame
        if frame is None:
            self.state.lost(self.site.name)
        stream = frame.streams.pop(self.site.index)
        branch = output[0] if isinstance(output, tuple) else output
        rest = self.site.drop(frame, stream)
        if rest is stream:
            return None
        branch = branch + (rest - stream).view_as(branch)
        return (branch, *output[1:]) if isinstance(output, tuple) else branch


class LayerForward:
    """Stands in for a block's forward while a step runs: stochastic depth.

    Huang et al. 2016 (arXiv 1603.09382). `example`: what the block adds is dropped for whole examples, and
    scaled for the others; all of it is computed. `batch`: one decision for the whole batch, a function of the
    step alone, so that all ranks agree: a block that is dropped does not run, its parameters get gradients of
    zero; one that stays is scaled. The paper scales at test time instead. Compiled code cannot leave a layer
    out without being compiled anew, so there `batch` saves no time.
    """

    def __init__(
        self, state: State, site: Site, module: nn.Module, batch: bool, forward: Callable[..., Any]
    ) -> None:
        self.state = state
        self.site = site
        self.module = module
        self.batch = batch
        self.forward = forward
        #: What the block returns beside the hidden states: names or places of arguments handed on, or None.
        self.beside: list[Any] | None = None
        self.alone = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (self.module.training or self.state.drawing):
            return self.forward(*args, **kwargs)
        frame, site = self.state.frame, self.site
        if frame is None:
            self.state.lost(site.name)
        x = _first(args, kwargs, site.name)
        if self.batch and not torch.compiler.is_compiling():
            index = site.index
            visit = frame.visits[index]
            rate, step, key = site.enter(frame)
            assert isinstance(key, Key)
            frame.visits[index] = visit
            if rate and is_dropped(int(rate), key.value, int(step)):
                # What lies inside counts the visit too: a block that is visited again (ALBERT) has the masks
                # of that visit, whether it was left out before or, in compiled code, run.
                for inner in self.inside():
                    frame.visits[inner] += 1
                frame.visits[index] = visit + 1
                return self.left_out(x, args, kwargs)
        output = self.forward(*args, **kwargs)
        whole = isinstance(output, tuple)
        branch = (output[0] if whole else output) - x
        shared = None
        if self.batch:
            shared = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
        dropped = site.drop(
            frame,
            branch,
            noise=Noise(locked=True, block=x.shape[-1]),
            examples=shared,
            positions=torch.zeros((1, x.shape[1]), dtype=torch.int64, device=x.device),
        )
        if dropped is branch:
            return output
        y = x + dropped
        return (y, *output[1:]) if whole else y

    def inside(self) -> list[int]:
        """The numbers of the sites in this block."""
        block = self.site.name.partition("#")[0]
        return [
            site.index
            for site in self.state.sites
            if site is not self.site and site.name.startswith((f"{block}.", f"{block}#"))
        ]

    def left_out(self, x: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what the block returns when it adds nothing."""
        if self.beside is None:
            output = self.looked_at(args, kwargs)
            given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
            self.beside = []
            for item in output[1:] if isinstance(output, tuple) else ():
                name = next((n for n, value in given.items() if value is item and item is not None), None)
                self.beside.append(name)
            self.alone = not isinstance(output, tuple)
        y = _LeftOut.apply(x, *(p for p in self.module.parameters() if p.requires_grad))
        if self.alone:
            return y
        # What the block only hands on (T5's position biases) goes on; what it makes (weights) is not there.
        handed = [
            None if name is None else args[name] if isinstance(name, int) else kwargs[name]
            for name in self.beside
        ]
        return (y, *handed)

    def looked_at(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the block once, for the form of what it returns, and leave no trace of it.

        Only a call tells that form. It must move neither a generator nor the statistics of a norm nor a count
        of visits: a run that is resumed looks at another step than one that was not.
        """
        training = [module for module in self.module.modules() if module.training]
        frame, drawing = self.state.frame, self.state.drawing
        assert frame is not None
        visits, streams = list(frame.visits), dict(frame.streams)
        self.module.eval()
        self.state.drawing = False
        try:
            with torch.no_grad():
                return self.forward(*args, **kwargs)
        finally:
            self.state.drawing = drawing
            frame.visits[:] = visits
            frame.streams = streams
            for module in training:
                module.training = True


class _LeftOut(torch.autograd.Function):
    """The identity on `x`, whose backward gives the parameters zeros instead of nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.parameters = [(p.shape, p.dtype, p.device) for p in parameters]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        zeros = [torch.zeros(shape, dtype=dtype, device=at) for shape, dtype, at in ctx.parameters]
        return grad, *zeros


def is_dropped(threshold: int, key: int, step: int) -> bool:
    """Whether a layer is left out for the whole batch: the decision at example, position and column 0."""
    zero = torch.zeros((), dtype=torch.int64)
    return int(lanes(key, step, zero, zero, zero, zero)) < threshold


def _first(args: tuple[Any, ...], kwargs: dict[str, Any], where: str) -> torch.Tensor:
    """The hidden states that a block or a norm is given, by place or by name."""
    found = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(found, torch.Tensor):
        raise ShapeError(
            f"the module at site {where!r} must be given its hidden states first or by the name "
            f"hidden_states; got {[*map(type, args)]} and {[*kwargs]}"
        )
    return found

"""The dropout of an adapter (LoRA) without a stored copy of the dropped input.

An adapter's first matrix needs its input for its gradient, and that input is dropped: read as usual, a whole
copy of it would be kept until the backward pass, for each adapter. Here the input itself is kept, which all
adapters of one input share, and the backward drops it again by its key. Knows the site and the frame, not the
adapter library.

Letters: B rows, T positions, C columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from twodice.dropout.hooks import OutputHook
from twodice.dropout.site import Site
from twodice.dropout.state import State

_PLAIN = (torch.Tensor, nn.Parameter)


class AdapterHook(OutputHook):
    """After the dropout of an adapter: drop, and remember of what until the matrix has read it."""

    def __init__(self, state: State, site: Site) -> None:
        super().__init__(state, site)
        #: What was dropped, what it was made of, and how it is made again.
        self.last: tuple[torch.Tensor, torch.Tensor, Callable[[torch.Tensor], torch.Tensor]] | None = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        frame, site = self.state.frame, self.site
        visits = () if frame is None else tuple(frame.visits)
        dropped = super().__call__(module, args, output)
        if torch.compiler.is_compiling():  # what is kept is then the compiler's choice
            return dropped
        self.last = None
        if (
            frame is not None
            and isinstance(output, torch.Tensor)
            and dropped is not None
            and dropped is not output
        ):
            self.last = dropped, output, lambda x: site.apply(frame.repeated(visits), x)
        return dropped


class AdapterForward:
    """Stands in for the forward of an adapter's first matrix while a step runs."""

    def __init__(self, hook: AdapterHook, module: nn.Linear, forward: Callable[..., Any]) -> None:
        self.hook = hook
        self.module = module
        self.forward = forward

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, rank)."""
        if torch.compiler.is_compiling():
            return self.forward(x)  # type: ignore[no-any-return]
        last, self.hook.last = self.hook.last, None
        weight = self.module.weight
        plain = type(x) in _PLAIN and type(weight) in _PLAIN and self.module.bias is None
        if (
            last is None
            or last[0] is not x
            or not plain
            or torch.is_autocast_enabled(x.device.type)
            or torch._C._are_functorch_transforms_active()
        ):
            return self.forward(x)  # type: ignore[no-any-return]
        _, source, again = last
        return _Read.apply(source, weight, x.detach(), again)  # type: ignore[no-any-return]


class _Read(torch.autograd.Function):
    """``dropped @ weight.t()``, which keeps what was dropped as it was before."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, dropped: torch.Tensor, again: Any) -> Any:
        ctx.save_for_backward(x, weight)
        ctx.again = again
        return functional.linear(dropped, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        to_x = ctx.again(grad @ weight) if ctx.needs_input_grad[0] else None
        to_weight = None
        if ctx.needs_input_grad[1]:
            to_weight = grad.flatten(0, -2).t() @ ctx.again(x).flatten(0, -2)
        return to_x, to_weight, None, None

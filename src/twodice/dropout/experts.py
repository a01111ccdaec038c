"""The stand-in for the forward of stacked experts: a mixture with dropout before the last product of each.

The rows are sorted by expert, so that each product is one call for all experts and nothing depends on which
of them were chosen: compiled code is one graph. Which call that is follows the model's own choice
(``config._experts_implementation``). Outside a step, in eval, and at rate 0 the module's own forward runs.
Knows frame and site, not the plan.

Letters: N rows of a flattened batch, k experts of a row, S = N * k routed rows, C width, I inner width, E
experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from twodice.dropout.fused import sleeps
from twodice.dropout.site import Site
from twodice.dropout.state import State
from twodice.dropout.step import Frame
from twodice.errors import ConfigError
from twodice.kernels.noise import noisy


class _Routed(NamedTuple):
    """The routed rows, sorted by expert."""

    order: torch.Tensor  # (S,): where each stood in the flattened (N, k)
    rows: torch.Tensor  # (S,): of the N
    experts: torch.Tensor  # (S,)
    ends: torch.Tensor  # (E,) int32: where the rows of each expert end


class ExpertsForward:
    """The forward of stacked experts with a site at the input of their last product.

    A routed row keeps its example and position; column j of expert e is ``e * I + j``.
    """

    def __init__(self, state: State, site: Site, module: nn.Module, forward: Callable[..., Any]) -> None:
        self.state = state
        self.site = site
        self.module: Any = module
        self.forward = forward
        for name in ("has_post_expert_norm", "_is_expert_parallel"):
            if getattr(module, name, False):
                raise ConfigError(f"experts with {name} are not served at {site.name!r}; leave it out")
        # Here, so that nobody without such a model loads transformers.
        from transformers.integrations.moe import _batched_linear, _grouped_linear

        self._batched, self._grouped = _batched_linear, _grouped_linear

    def __call__(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(N, C) rows, (N, k) experts and their weights -> (N, C)."""
        if sleeps(self.state, self.module, [self.site]):
            return self.forward(hidden_states, top_k_index, top_k_weights)  # type: ignore[no-any-return]
        frame = self.state.frame
        assert frame is not None
        N, k = top_k_index.shape
        if frame.rows is None or N % frame.rows:
            self.site.misfit(frame, hidden_states)
        experts, order = top_k_index.reshape(-1).sort(stable=True)
        every = torch.arange(self.module.num_experts, device=experts.device)
        ends = torch.searchsorted(experts, every, right=True, out_int32=True)
        routed = _Routed(order, order // k, experts, ends)
        inner = self._dropped(frame, self._inner(hidden_states[routed.rows], routed), routed, N)
        outer = self._product(inner, "down_proj", routed) * top_k_weights.reshape(-1)[order][:, None]
        # Back into the order of the rows and summed over k: on a GPU index_add would sum in any order.
        place = torch.empty_like(order)
        place[order] = torch.arange(N * k, device=order.device)
        total: torch.Tensor = outer[place].unflatten(0, (N, k)).sum(1)
        return total.to(hidden_states.dtype)

    def _inner(self, x: torch.Tensor, routed: _Routed) -> torch.Tensor:
        module = self.module
        if not getattr(module, "has_gate", True):
            return module.act_fn(self._product(x, "up_proj", routed))  # type: ignore[no-any-return]
        return module._apply_gate(self._product(x, "gate_up_proj", routed))  # type: ignore[no-any-return]

    def _dropped(self, frame: Frame, x: torch.Tensor, routed: _Routed, N: int) -> torch.Tensor:
        """(S, I) with units dropped."""
        site, rows = self.site, routed.rows
        assert frame.rows is not None
        T = N // frame.rows
        row, times = rows // T, rows % T
        examples, positions = frame.examples, frame.positions.get(site.stack)
        if examples is None:
            examples = row
        else:
            examples = examples.to(x.device)
            examples = examples.reshape(-1)[rows] if examples.dim() == 2 else examples[row]
        if positions is not None:
            times = positions.to(x.device).expand(frame.rows, T).reshape(-1)[rows]
        rate, step, key = site.enter(frame)
        if isinstance(step, torch.Tensor) and step.dim() > 0:
            step = step.to(x.device)[row]
        return noisy(
            x[:, None, None, :], rate, key, step,
            noise=site.noise, examples=examples, positions=times[:, None],
            key_positions=(routed.experts * x.shape[1])[:, None], layout="bhts",
        )[:, 0, 0]  # fmt: skip

    def _product(self, x: torch.Tensor, name: str, routed: _Routed) -> torch.Tensor:
        """Each row times the matrix of its expert."""
        module, experts = self.module, routed.experts
        weight, bias = getattr(module, name), getattr(module, f"{name}_bias", None)
        turned = getattr(module, "is_transposed", False)
        chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
        if chosen in ("eager", None) and not torch.compiler.is_compiling():
            return _one_by_one(x, weight, bias, routed.ends, turned)
        each = None if bias is None else bias[experts]
        if chosen == "batched_mm":
            return self._batched(x, weight[experts], each, is_transposed=turned)  # type: ignore[no-any-return]
        # Also for a kernel that shows nothing between the two products.
        return self._grouped(x, weight, routed.ends, each, is_transposed=turned)  # type: ignore[no-any-return]


def _one_by_one(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, ends: torch.Tensor, turned: bool
) -> torch.Tensor:
    """The products of the experts that have rows, one after the other."""
    made, start = [], 0
    # Taken apart at once: the gradient is then put together once, not a whole one for each expert.
    biases = weight.shape[0] * (None,) if bias is None else bias.unbind()
    for end, matrix, shift in zip(ends.tolist(), weight.unbind(), biases, strict=True):
        if end > start:
            made.append(functional.linear(x[start:end], matrix.t() if turned else matrix, shift))
        start = end
    return torch.cat(made)

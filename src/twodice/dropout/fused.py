"""Stand-ins for the forward of modules that hide their tensors, in force while a step runs.

`nn.MultiheadAttention` and `nn.LSTM` and its kin compute inside one call what other modules show between two;
here the same is computed with the sites' masks in its place. Outside a step, in eval, and at rate 0 the
module's own forward runs. Knows frame and site, not the plan.

Letters: B rows, T queries, S keys, C width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from twodice.dropout.recurrent import recurrent_forward
from twodice.dropout.site import Site
from twodice.dropout.state import State
from twodice.dropout.step import Frame
from twodice.errors import ConfigError, ShapeError
from twodice.kernels.attention import attention
from twodice.kernels.noise_form import Noise
from twodice.random.keys import Key


def sleeps(state: State, module: nn.Module, sites: list[Site]) -> bool:
    """Whether the module's own forward is to run; a visit is counted where a step is on."""
    if not (module.training or state.drawing):
        return True
    frame = state.frame
    if frame is None:
        state.lost(sites[0].name)
    if not torch.compiler.is_compiling() and all(frame.snapshot.thresholds[s.index] == 0 for s in sites):
        for site in sites:
            frame.visits[site.index] += 1
        return True
    return False


class StandIn:
    """What stands in for a module's forward, for several sites."""

    def __init__(self, state: State, module: Any, forward: Callable[..., Any]) -> None:
        self.state = state
        self.module = module
        self.forward = forward
        self.sites: dict[str, Site] = {}


class RecurrentForward(StandIn):
    """The forward of an ``nn.LSTM`` and its kin, with dropout between the layers and of the weights."""

    def __call__(self, input: Any, hx: Any = None) -> Any:
        """As the module's own forward."""
        if sleeps(self.state, self.module, list(self.sites.values())):
            return self.forward(input, hx)
        frame = self.state.frame
        assert frame is not None
        between, weights, step = None, {}, frame.snapshot.step
        for name, site in self.sites.items():
            rate, step, key = site.enter(frame, whole=True)
            assert isinstance(key, Key)
            if name == "between":
                between = rate, key, site.noise
            else:
                weights[name] = rate, key
        first = next(iter(self.sites.values()))
        return recurrent_forward(
            self.module, input, hx, step=step, between=between, weight=weights or None,
            examples=frame.examples, positions=frame.positions.get(first.stack), training=True,
        )  # fmt: skip


class MultiheadForward(StandIn):
    """The forward of an ``nn.MultiheadAttention`` with sites for weights, keys and heads.

    Weights, where they are asked for, are those after dropout, as torch gives them.
    """

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `torch.nn.MultiheadAttention.forward`."""
        module = self.module
        if sleeps(self.state, module, list(self.sites.values())):
            return self.forward(  # type: ignore[no-any-return]
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        frame = self.state.frame
        assert frame is not None
        name = next(iter(self.sites.values())).name
        if query.dim() != 3:
            raise ShapeError(f"attention at {name!r} must be given batches (three axes); got {query.dim()}")
        if module.bias_k is not None or module.add_zero_attn:
            raise ConfigError(
                f"add_bias_kv and add_zero_attn are not served at {name!r}; leave it out of the plan"
            )
        if not module.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        H = module.num_heads
        q, k, v = (x.unflatten(-1, (H, -1)).transpose(1, 2) for x in self._projected(query, key, value))
        bias = self._bias(attn_mask, key_padding_mask, q.shape[0], H, q.dtype)
        arguments, rest = self._arguments(frame, name, q.shape[2], k.shape[2])
        rest["bias"] = bias
        joined = attention(q, k, v, *arguments, **rest).transpose(1, 2).flatten(2)
        if "head" in self.sites:
            site = self.sites["head"]
            joined = site.drop(frame, joined, noise=Noise(locked=True, block=joined.shape[-1] // H))
        # The module itself is called by nobody here, only its weights: a weight site may stand in for them.
        result = functional.linear(joined, module.out_proj.weight, module.out_proj.bias)
        if not module.batch_first:
            result = result.transpose(0, 1)
        if not need_weights:
            return result, None
        # Against values that are the identity, attention is its weights.
        ones = torch.eye(k.shape[2], dtype=v.dtype, device=v.device).expand(*k.shape[:2], -1, -1)
        weights = attention(q, k, ones, *arguments, **rest)
        return result, weights.mean(1) if average_attn_weights else weights

    def _projected(self, query: Any, key: Any, value: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        module = self.module
        if module._qkv_same_embed_dim:
            weights = module.in_proj_weight.chunk(3)
        else:
            weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        biases = (None,) * 3 if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
        q, k, v = (
            functional.linear(x, weight, bias)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        return q, k, v

    @staticmethod
    def _bias(
        mask: torch.Tensor | None, padding: torch.Tensor | None, B: int, H: int, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """One additive mask of both; in torch's booleans True hides."""
        total: torch.Tensor | None = None
        for one, is_padding in ((mask, False), (padding, True)):
            if one is None:
                continue
            if one.dtype == torch.bool:
                one = torch.zeros_like(one, dtype=dtype).masked_fill_(one, float("-inf"))
            if is_padding:
                one = one[:, None, None, :]
            elif one.dim() == 3:
                one = one.unflatten(0, (B, H))
            total = one if total is None else total + one
        return total

    def _arguments(self, frame: Frame, name: str, T: int, S: int) -> tuple[list[Any], dict[str, Any]]:
        numbers: dict[str, tuple[Any, Any]] = {"attention": (0, 0), "key": (0, None)}
        step: int | torch.Tensor = 0
        for kind in ("attention", "key"):
            if kind in self.sites:
                rate, step, key = self.sites[kind].enter(frame)
                numbers[kind] = rate, key
        site = next(iter(self.sites.values()))
        positions = frame.positions.get(site.stack)
        keys = positions if S == T else frame.positions.get("encoder")
        rest = {
            "examples": frame.examples, "positions": positions, "key_positions": keys,
            "drop_keys": numbers["key"][0], "keys_key": numbers["key"][1],
        }  # fmt: skip
        return [*numbers["attention"], step], rest

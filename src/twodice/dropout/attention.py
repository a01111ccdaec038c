"""Attention with keyed dropout on its weights, in the form in which transformers calls an attention function.

A plain path: scores, softmax, dropout, product. It is in force only inside a step and only for the attached
model, whose attention modules then see a copy of their config with our name in it (`shadow`). What it does
not serve is refused by name. Knows the frame and the site, not the plan.

Letters: B rows, H query heads, G query heads for each key head, T queries, S keys, K head width.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from twodice.errors import ConfigError, ContractError

if TYPE_CHECKING:
    from twodice.dropout.hooks import Site, State
    from twodice.dropout.step import Frame

#: Arguments that change the weights in a way that this path does not know.
REFUSED = (
    "softcap",
    "s_aux",
    "sinks",
    "position_bias",
    "head_mask",
    "cache",
    "cu_seq_lens_q",
    "cu_seq_lens_k",
)
SERVED = ("eager", "sdpa")


class Attending:
    """One attention module of an attached model: its sites, and how it would attend without us.

    Attributes
    ----------
    module : nn.Module
        The attention module.
    weights, keys : Site or None
        What drops weights after the softmax, and what drops keys before it.
    road : str
        The implementation that the config names.
    function : callable
        The function behind it.
    """

    def __init__(self, state: State, module: nn.Module) -> None:
        self.state = state
        self.module = module
        self.weights: Site | None = None
        self.keys: Site | None = None
        self.road = ""
        self.function: Callable[..., Any] | None = None

    @property
    def name(self) -> str:
        """The name of a site of this module, for messages."""
        site = self.weights or self.keys
        assert site is not None
        return site.name

    @property
    def stack(self) -> str | None:
        """The stack of the queries."""
        site = self.weights or self.keys
        assert site is not None
        return site.stack

    def find_road(self) -> None:
        """Read which implementation the config names now, or refuse it.

        Raises
        ------
        ConfigError
            If the implementation is not one whose masks are understood.
        """
        config = self.module.config
        name = config._attn_implementation  # type: ignore[union-attr]
        if name not in SERVED:
            raise ConfigError(
                f"attention dropout is served for {' and '.join(SERVED)}; the model uses {name!r} at "
                f"{self.name!r}; load it with attn_implementation='sdpa'"
            )
        if getattr(config, "reorder_and_upcast_attn", False):
            raise ConfigError(
                f"attention dropout is not served with reorder_and_upcast_attn=True (at {self.name!r})"
            )
        self.road = name
        if name == "eager":
            self.function = sys.modules[type(self.module).__module__].eager_attention_forward
        else:
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

            self.function = ALL_ATTENTION_FUNCTIONS[name]

    def shadow(self, name: str) -> Any:
        """Return a copy of the config that names our attention function and carries this object; the config
        stays as it is.
        """
        copied = copy.copy(self.module.config)
        copied.__dict__["_attn_implementation_internal"] = name
        copied.__dict__["twodice_attending"] = self
        return copied


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **rest: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend, with the weights dropped that the step's mask names.

    Parameters
    ----------
    module : nn.Module
        The attention module; its config is that of `Attending.shadow`.
    query : tensor (B, H, T, K)
        Queries; key and value are (B, H / G, S, K).
    attention_mask : tensor or None
        Boolean (True attends) or additive, broadcastable to (B, H, T, S); None means causal where the module
        is and the road is ``sdpa``, else everything.
    scaling : float or None
        Factor of the scores; None means 1 / sqrt(K).

    Returns
    -------
    tuple
        (B, T, H, K), and the weights after dropout (B, H, T, S).
    """
    attending: Attending = module.config.twodice_attending  # type: ignore[union-attr, assignment]
    site = attending.weights
    assert site is not None
    state = attending.state
    frame = state.frame
    compiling = torch.compiler.is_compiling()
    if frame is None and module.training:
        state.lost(site.name)
    if not module.training or frame is None or (not compiling and frame.snapshot.thresholds[site.index] == 0):
        if module.training and frame is not None:
            frame.visits[site.index] += 1
        if is_causal is not None:
            rest["is_causal"] = is_causal
        return attending.function(  # type: ignore[no-any-return, misc]
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **rest
        )
    for name in REFUSED:
        if rest.get(name) is not None:
            raise ConfigError(
                f"attention dropout does not serve {name!r} yet (at site {site.name!r}); leave it out of "
                "the plan"
            )
    B, H, T, K = query.shape
    heads, S = key.shape[1], key.shape[2]
    if H != heads:
        # Grouped queries: head h of the queries reads key head h // G, so a view with one more axis needs no
        # copies.
        query = query.reshape(B, heads, H // heads, T, K)
        key, value = key.unsqueeze(2), value.unsqueeze(2)
    scores = torch.matmul(query * (K**-0.5 if scaling is None else scaling), key.transpose(-1, -2))
    scores = scores.reshape(B, H, T, S)
    if attention_mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if attending.road == "sdpa" and causal and T > 1:
            scores += _causal(frame, T, S, scores)
    elif attention_mask.dtype == torch.bool:
        # The lowest number and not minus infinity: a row without any key (padding) must not become NaN.
        scores.masked_fill_(~attention_mask[..., :S], torch.finfo(scores.dtype).min)
    else:
        scores += attention_mask[..., :S]
    wide = torch.float32 if scores.dtype in (torch.bfloat16, torch.float16) else scores.dtype
    weights = torch.softmax(scores, dim=-1, dtype=wide).to(value.dtype)
    weights = site.drop(frame, weights, key_positions=_key_positions(frame, site.stack, T, S, site.name))
    if H != heads:
        out = torch.matmul(weights.reshape(B, heads, H // heads, T, S), value).reshape(
            B, H, T, value.shape[-1]
        )
    else:
        out = torch.matmul(weights, value)
    return out.transpose(1, 2).contiguous(), weights


def _causal(frame: Frame, T: int, S: int, scores: torch.Tensor) -> torch.Tensor:
    """The additive mask (T, S) of a causal forward, made once a frame. Query t sees key s where s <= t, as
    sdpa has it.
    """
    name = (T, S, scores.dtype, scores.device)
    mask = None if torch.compiler.is_compiling() else frame.causal.get(name)
    if mask is None:
        mask = torch.full((T, S), float("-inf"), dtype=scores.dtype, device=scores.device).triu(1)
        if not torch.compiler.is_compiling():
            frame.causal[name] = mask
    return mask


def _key_positions(frame: Frame, stack: str | None, T: int, S: int, site: str) -> torch.Tensor | None:
    """Positions (B, S) of the keys: those of the queries, and before them what a cache holds, one by one
    backwards.
    """
    positions = frame.positions.get(stack)
    if S == T:
        return positions
    if positions is None or S < T:
        raise ContractError(
            f"keys must be the tokens of this forward or those of a growing cache; got {S} keys for {T} "
            "tokens at site "
            f"{site!r}; train without a static cache"
        )
    if (
        not torch.compiler.is_compiling()
        and T > 1
        and bool((positions[:, 1:] - positions[:, :-1] != 1).any())
    ):
        raise ContractError(
            f"positions must be consecutive where a cache is filled; got others at site {site!r}"
        )
    back = torch.arange(S - 1, -1, -1, device=positions.device)
    return (positions[:, -1:] - back).clamp(min=0)

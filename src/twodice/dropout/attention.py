"""Attention with keyed dropout on its weights, in the form in which transformers calls an attention function.

`attend` hands what it is given to `kernels.attention`. It is in force only inside a step and only for the
attached model, whose attention modules then see a copy of their config with our name in it
(`Attending.shadow`). What it does not serve is refused by name. Knows the frame and the site, not the plan.

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
from twodice.kernels.attention import attention

if TYPE_CHECKING:
    from twodice.dropout.site import Site
    from twodice.dropout.state import State
    from twodice.dropout.step import Frame

#: Arguments that ask for weights, or change them, in a way that is not served.
REFUSED = ("output_attentions", "sinks", "head_mask", "cache", "cu_seq_lens_q", "cu_seq_lens_k")
SERVED = ("eager", "sdpa")


class Attending:
    """One attention module of an attached model: its sites, and how it would attend without us.

    Attributes
    ----------
    module : nn.Module
        The attention module.
    weights, keys : Site or None
        What drops weights after the softmax, and what drops keys before it.
    cross : bool
        Whether the keys are those of the other stack.
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
        self.cross = False
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
        self.road = str(name)
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
    """Attend, with the keys and weights dropped that the step's masks name.

    Parameters
    ----------
    module : nn.Module
        The attention module; its config is that of `Attending.shadow`.
    query : tensor (B, H, T, K)
        Queries; key and value are (B, H / G, S, K) and (B, H / G, S, W).
    attention_mask : tensor or None
        Boolean (True attends) or additive, broadcastable to (B, H, T, S); None means causal where the module
        is and the road is ``sdpa``, else everything.
    scaling : float or None
        Factor of the scores; None means 1 / sqrt(K).

    Returns
    -------
    tuple
        (B, T, H, W), and None: the weights are never whole in memory.
    """
    attending: Attending = module.config.twodice_attending  # type: ignore[union-attr, assignment]
    state = attending.state
    frame = state.frame
    active = module.training or state.drawing
    if frame is None and active:
        state.lost(attending.name)
    sites = [site for site in (attending.weights, attending.keys) if site is not None]
    compiling = torch.compiler.is_compiling()
    if (
        not active
        or frame is None
        or (not compiling and all(frame.snapshot.thresholds[site.index] == 0 for site in sites))
    ):
        if active and frame is not None:
            for site in sites:
                frame.visits[site.index] += 1
        if is_causal is not None:
            rest["is_causal"] = is_causal
        assert attending.function is not None
        return attending.function(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **rest
        )
    for name in REFUSED:
        if rest.get(name) is not None and rest[name] is not False:
            raise ConfigError(
                f"attention dropout does not serve {name!r} (at site {attending.name!r}); leave the site out "
                "of the plan, or the argument out of the call"
            )
    B, _, T, _ = query.shape
    S = key.shape[2]
    if frame.rows is not None and frame.rows != B:
        sites[0].misfit(frame, query)
    causal = False
    if attention_mask is None:
        wanted = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = attending.road == "sdpa" and bool(wanted) and T > 1
    else:
        attention_mask = attention_mask[..., :S]
    numbers: list[Any] = [0, None, 0, None]
    step: int | torch.Tensor = 0
    for place, one in ((0, attending.weights), (2, attending.keys)):
        if one is not None:
            numbers[place], step, numbers[place + 1] = one.enter(frame)
    sinks = rest.get("s_aux")
    result = attention(
        query, key, value, numbers[0], 0 if numbers[1] is None else numbers[1], step,
        bias=_together(attention_mask, rest.get("position_bias"), S),
        causal=causal, softcap=rest.get("softcap"), sinks=None if sinks is None else sinks.to(query.dtype),
        scale=scaling, examples=frame.examples, positions=frame.positions.get(attending.stack),
        key_positions=_key_positions(frame, attending, T, S),
        drop_keys=numbers[2], keys_key=numbers[3],
    )  # fmt: skip
    return result.transpose(1, 2).contiguous(), None


def _together(mask: torch.Tensor | None, bias: torch.Tensor | None, keys: int) -> torch.Tensor | None:
    """One additive or boolean mask of an attention mask and T5's bias of positions."""
    if mask is not None and mask.dtype != torch.bool:
        # Transformers hides with the lowest number. DropKey must not take such a key for one that is seen.
        mask = mask.masked_fill(mask <= torch.finfo(mask.dtype).min / 2, float("-inf"))
    if bias is None:
        return mask
    bias = bias[..., :keys]
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return bias.masked_fill(~mask, float("-inf"))
    return bias + mask


def _key_positions(frame: Frame, attending: Attending, T: int, S: int) -> torch.Tensor | None:
    """Positions (B, S) of the keys: across stacks those of the encoder; else those of the queries, and before
    them what a cache holds, one by one backwards.
    """
    if attending.cross:
        return frame.positions.get("encoder")
    positions = frame.positions.get(attending.stack)
    if S == T:
        return positions
    site = attending.name
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

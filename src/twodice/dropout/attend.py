"""Attention with dropout on its weights as a function, for one's own models. Knows no plan and no model: a
rate becomes a threshold, no more.

Letters: B rows, H query heads, N key heads, T queries, S keys, K key width, W value width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from twodice.dropout.functional import _integers, _threshold
from twodice.kernels.attention import attention as kernel
from twodice.random.keys import Key

__all__ = ["attention"]


def attention(
    query: torch.Tensor,
    key_states: torch.Tensor,
    value: torch.Tensor,
    p: float | torch.Tensor = 0.0,
    *,
    key: Key | int,
    step: int | torch.Tensor,
    bias: torch.Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    scale: float | None = None,
    drop_keys: float | torch.Tensor = 0.0,
    examples: torch.Tensor | Sequence[int] | None = None,
    positions: torch.Tensor | Sequence[int] | None = None,
    key_positions: torch.Tensor | Sequence[int] | None = None,
) -> torch.Tensor:
    """Attend with weights dropped at rate `p`, without keeping a (T, S) tensor for the backward pass.

    Parameters
    ----------
    query : tensor (B, H, T, K)
        float32, float64, bfloat16 or float16.
    key_states, value : tensor (B, N, S, K), (B, N, S, W)
        Of the dtype of `query`. N divides H (grouped queries): head h reads key head ``h // (H / N)``. W may
        differ from K, and S from T.
    p : float or 0-dim tensor
        Probability of dropping a weight, in [0, 1]; 0 is neutral. As in `dropout`: a float is a constant, a
        tensor a value on a schedule.
    key : Key or int
        Names this place in the model; what is dropped, not the keys that are attended to.
    step : int, or int64 tensor, 0-dim or (B,)
        The training step, in [0, 2^32).
    bias : tensor broadcastable to (B, H, T, S), optional
        Added to the scores, after the cap; or boolean: True where the key is seen. Gets a gradient where it
        requires one.
    causal : bool
        Whether query t sees keys s <= t only, counted from the first of both, as
        `scaled_dot_product_attention` has it.
    window : int, optional
        Query t sees only keys with ``|t - s| < window``; at least 1, None for all.
    softcap : float, optional
        Scores become ``softcap * tanh(scores / softcap)``; positive, None for no cap.
    sinks : tensor (H,), optional
        One more logit a head, which takes mass and has no value.
    scale : float, optional
        Of the scores; default ``1 / sqrt(K)``.
    drop_keys : float or 0-dim tensor
        Rate of DropKey, in [0, 1]: before the softmax, each key is hidden from each query with this
        probability, with no scale. A row that would lose all its keys keeps all. Its stream is the child
        ``"keys"`` of `key`.
    examples, positions, key_positions
        As in `dropout` with layout ``bhts``: slots (B,) or (B, T) in the global batch, positions (B, T) of
        the queries and (B, S) of the keys, or (B, 1) of the first, from which the others count on.

    Returns
    -------
    tensor (B, H, T, W)
        Of the dtype of `query`. A row that sees no key gives zero.

    Raises
    ------
    ConfigError
        If a rate, a coordinate, the window or the softcap is outside its range.
    ShapeError
        If shapes, types or devices do not fit.

    Notes
    -----
    *Randomness.* Weight (example, head, query, key) is dropped iff `dropout` with layout ``bhts`` drops it: a
    pure function of (key, step, example, head, position of the query, position of the key), whatever the
    blocks and threads. The backward pass computes it again.

    Vaswani et al. 2017, "Attention is all you need", equation 1, with dropout on the weights. Dao et al.
    2022, "FlashAttention", algorithm 4: what is kept is the result and the log of the sum of exponentials of
    each row; unlike there the mask has no generator's state. Li et al. 2022, "DropKey" (arXiv 2208.02646),
    equation 3; unlike there a row never loses all its keys. Double backward is not defined. The gradient of a
    bias under a softcap, and float64, take the readable reference, which makes all (T, S) for a moment.

    Examples
    --------
    >>> import torch, twodice
    >>> x = torch.zeros(1, 1, 2, 8)
    >>> twodice.attention(x, x, torch.eye(8)[None, None, :2], 0.5, key=7, step=17)[0, 0, :, :2]
    tensor([[1., 1.],
            [1., 0.]])
    """
    root = key if isinstance(key, Key) else Key(key)
    return kernel(
        query,
        key_states,
        value,
        _threshold(p),
        root,
        step,
        bias=bias,
        causal=causal,
        window=window,
        softcap=softcap,
        sinks=sinks,
        scale=scale,
        examples=_integers("examples", examples),
        positions=_integers("positions", positions),
        key_positions=_integers("key_positions", key_positions),
        drop_keys=_threshold(drop_keys),
        keys_key=root.child("keys"),
    )

"""R-Drop: the loss of two passes whose masks differ. Draws nothing; the masks come from the passes.

Letters: N tokens (any leading axes), V classes or vocabulary.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch.nn import functional

from twodice.errors import ConfigError, ShapeError

REDUCTIONS = ("mean", "sum")


def r_drop_loss(
    logits_a: torch.Tensor,
    logits_b: torch.Tensor,
    labels: torch.Tensor,
    alpha: float = 1.0,
    *,
    divergence: Literal["mean", "sum"] = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Return the mean cross-entropy of two passes plus `alpha` times the divergence between them.

    Parameters
    ----------
    logits_a, logits_b : tensor (..., V)
        Of two passes over one batch with different masks. The loss is symmetric in them.
    labels : int64 tensor (...)
        The class of each token, as the logits stand: those of a causal model are shifted by the caller.
    alpha : float
        At least 0; 0 is neutral. The paper has 1 to 5.
    divergence : {"mean", "sum"}
        Over the tokens; over the classes it is a sum always. ``mean`` makes alpha independent of the size of
        the batch. ``sum`` is what the authors' published snippet does, beside a cross-entropy that is a mean:
        there alpha acts as alpha times the number of tokens.
    ignore_index : int
        Tokens with this label count in neither part.
    label_smoothing : float
        In [0, 1], of the cross-entropy.

    Returns
    -------
    tensor ()
        In nats per token, float32 or wider.

    Raises
    ------
    ConfigError
        If alpha or divergence cannot be meant.
    ShapeError
        If the shapes do not fit.

    Notes
    -----
    With P and Q the distributions of a token in the two passes and y its label,
    ``loss = mean(-(log P(y) + log Q(y)) / 2) + alpha * mean((KL(P || Q) + KL(Q || P)) / 2)``. Liang et al.
    2021 (arXiv 2106.14448), equations 2 to 4, have twice the first part, so that their alpha is twice this
    one; their snippet halves it, as here. The gradient flows through both passes. No token that counts gives
    NaN, as a mean of nothing does.

    *Randomness.* None here. The two passes take their masks from two draws of one step; both run in train
    mode, and no weights change between them.

    Examples
    --------
    >>> import torch, twodice
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 3))
    >>> handle = twodice.attach(model, "dropout=0.3", seed=0)
    >>> x, labels, slots = torch.ones(2, 4), torch.tensor([0, 2]), torch.arange(2)
    >>> with handle.step(17, examples=slots, draw=0):
    ...     a = model(x)
    >>> with handle.step(17, examples=slots, draw=1):
    ...     b = model(x)
    >>> loss = r_drop_loss(a, b, labels, alpha=1.0)
    >>> loss.backward()
    >>> bool(r_drop_loss(a, a, labels, alpha=9.0) == r_drop_loss(a, a, labels, alpha=0.0))
    True
    >>> handle.detach()
    """
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 <= alpha < math.inf:
        raise ConfigError(f"alpha must be a number in [0, inf); got {alpha!r}")
    if divergence not in REDUCTIONS:
        raise ConfigError(f"divergence must be mean or sum; got {divergence!r}")
    if logits_a.shape != logits_b.shape or labels.shape != logits_a.shape[:-1]:
        raise ShapeError(
            "both passes must have one shape (..., V) and the labels (...); got "
            f"{tuple(logits_a.shape)}, {tuple(logits_b.shape)} and {tuple(labels.shape)}"
        )
    wide = torch.promote_types(logits_a.dtype, torch.float32)
    a, b = (logits.flatten(0, -2).to(wide) for logits in (logits_a, logits_b))
    flat = labels.flatten()
    entropy = [
        functional.cross_entropy(x, flat, ignore_index=ignore_index, label_smoothing=label_smoothing)
        for x in (a, b)
    ]
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    # KL(P || Q) + KL(Q || P) is the sum of (P - Q) (log P - log Q): one pass, and never below 0. A class that
    # both passes exclude (-inf) adds nothing, though its logarithms have no difference.
    shut = torch.isneginf(log_a) & torch.isneginf(log_b)
    gap = (log_a - log_b).masked_fill(shut, 0.0)
    each = ((log_a.exp() - log_b.exp()) * gap).sum(-1) / 2
    counts = flat != ignore_index
    apart = torch.where(counts, each, torch.zeros_like(each)).sum()
    if divergence == "mean":
        apart = apart / counts.sum()
    return (entropy[0] + entropy[1]) / 2 + alpha * apart

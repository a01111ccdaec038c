"""The max-norm constraint: what comes into a unit may have at most a given length. Draws nothing.

Knows which axis of a weight is the unit, module by module.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from twodice.errors import ConfigError, ShapeError

_TRANSPOSED = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d


def max_norm_(
    module_or_parameters: nn.Module | torch.Tensor | Iterable[torch.Tensor], c: float
) -> torch.Tensor:
    """Shorten, in place, the incoming weights of every unit to a length of at most `c`.

    Call it after each step of the optimizer.

    Parameters
    ----------
    module_or_parameters : nn.Module, tensor or iterable of tensors
        Of a module: the matrices of its linear layers, convolutions (transposed ones too), recurrent nets
        (each gate is a unit), bilinear layers, attention, and transformers' ``Conv1D``; not lookups, norms or
        biases. Tensors are taken as they are: the first axis is the unit, the others what comes in. A tensor
        that stands at several places is shortened once.
    c : float
        In (0, inf]; inf is neutral. The paper has 3 to 4.

    Returns
    -------
    int64 tensor ()
        How many units were shortened.

    Raises
    ------
    ConfigError
        If c is not positive; if a module has no such matrix.
    ShapeError
        If a tensor has fewer than two axes.

    Notes
    -----
    Srivastava et al. 2014, section 5.1: ``||w|| <= c`` for the vector of weights into each hidden unit, by
    projection on the ball after every update. Biases are not part of it.

    Examples
    --------
    >>> import torch
    >>> layer = torch.nn.Linear(2, 2)
    >>> _ = layer.weight.data.copy_(torch.tensor([[3.0, 4.0], [0.3, 0.4]]))
    >>> max_norm_(layer, 2.5)
    tensor(1)
    >>> layer.weight.data
    tensor([[1.5000, 2.0000],
            [0.3000, 0.4000]])
    """
    if isinstance(c, bool) or not isinstance(c, int | float) or math.isnan(c) or c <= 0:
        raise ConfigError(f"the largest norm must be above 0; got {c!r}")
    if isinstance(module_or_parameters, nn.Module):
        views = list(_of_module(module_or_parameters))
        if not views:
            raise ConfigError(
                f"{type(module_or_parameters).__name__} has no matrix of incoming weights; give the tensors "
                "themselves, with the unit as their first axis"
            )
    else:
        one = isinstance(module_or_parameters, torch.Tensor)
        tensors: list[Any] = [module_or_parameters] if one else list(module_or_parameters)
        views = [(tensor, 0, tensor) for tensor in tensors]
    shortened: torch.Tensor | int = 0
    with torch.no_grad():
        for view in {(id(weight), group): view for weight, group, view in views}.values():
            if view.dim() < 2:
                raise ShapeError(
                    f"weights must have an axis of units and one of inputs; got shape {tuple(view.shape)}"
                )
            norm = torch.linalg.vector_norm(view, dim=tuple(range(1, view.dim())), keepdim=True)
            long = norm > c
            # Division by a norm that is too long only: a row of zeros stays, and a short one keeps its bits.
            view.mul_(torch.where(long, c / norm, torch.ones_like(norm)))
            shortened = shortened + long.sum()
    return torch.as_tensor(shortened)


def _of_module(root: nn.Module) -> Iterator[tuple[torch.Tensor, int, torch.Tensor]]:
    """Each matrix of incoming weights, the number of the group, and a view whose first axis is the unit."""
    module: Any
    for module in root.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Bilinear):
            yield module.weight, 0, module.weight
        elif isinstance(module, _TRANSPOSED):
            # (in, out / groups, ...): the inputs of a group reach the outputs of that group alone.
            split = module.weight.unflatten(0, (module.groups, -1)).movedim(1, 2)
            for group, view in enumerate(split):
                yield module.weight, group, view
        elif isinstance(module, nn.RNNBase):
            for name, weight in module.named_parameters():
                if name.startswith("weight_"):
                    yield weight, 0, weight
        elif isinstance(module, nn.MultiheadAttention):
            for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                weight = getattr(module, name)
                if weight is not None:
                    yield weight, 0, weight
        elif type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
            yield module.weight, 0, module.weight.t()

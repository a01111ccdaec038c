"""Which weights of a model can have entries dropped (DropConnect), and why others cannot.

Knows no stack. A matrix that several modules share is named at each, with the others in ``extra["tied"]``.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import nn

from twodice.dropout.places import Inventory
from twodice.dropout.wrappers import stood_in

#: Where the types of tensors come from whose entries are packed several to a number.
_PACKING = ("torchao.", "bitsandbytes.")


def weights(found: Inventory, modules: list[tuple[str, nn.Module]]) -> None:
    """Add a place of the kind ``weight`` for each matrix that a call of its module reads."""
    users: dict[int, list[str]] = defaultdict(list)
    for path, module in modules:
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter):
            users[id(weight)].append(path)
    lookups = {id(place.module) for place in found.places if place.kind == "word"}
    looked_up = {id(module.weight) for _, module in modules if id(module) in lookups}
    inner = {id(m.out_proj) for _, m in modules if isinstance(m, nn.MultiheadAttention)}
    for path, module in modules:
        if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
            for name in _matrices(module):
                found.add("weight", path, module, "weight", extra={"parameter": name, "tied": ()})
            continue
        if id(module) in inner or not _is_linear(module):
            continue
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Embedding) and id(module) not in lookups and id(weight) in looked_up:
            continue  # a second name of the table that is looked up elsewhere; nothing calls it
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point() or _packed(weight):
            why = f"the weights of {type(module).__name__} are packed (quantised): no site of weight"
            found.undecided.append((path, why))
            continue
        tied = tuple(other for other in users[id(weight)] if other != path)
        found.add(
            "weight",
            path,
            module,
            "weight",
            layer=_layer(found, path),
            extra={"parameter": "weight", "tied": tied},
        )


def _matrices(module: nn.Module) -> list[str]:
    """Names of the matrices of a fused module."""
    if isinstance(module, nn.RNNBase):
        return [name for name, _ in module.named_parameters() if name.startswith("weight_")]
    wanted = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
    return [name for name in wanted if getattr(module, name, None) is not None] + ["out_proj.weight"]


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer or a lookup: by type, or (quantised) by what it says of itself."""
    if isinstance(module, nn.Linear | nn.Embedding):
        return True
    if stood_in(module) is not None:
        return False
    kind = type(module)
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        return True
    return hasattr(module, "in_features") and hasattr(module, "out_features") and "Linear" in kind.__name__


def _packed(weight: torch.Tensor) -> bool:
    return type(weight).__module__.startswith(_PACKING)


def _layer(found: Inventory, path: str) -> int | None:
    for stack in found.stacks:
        for layer, block in enumerate(stack.paths):
            if path.startswith(f"{block}."):
                return layer
    return None

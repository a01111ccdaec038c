"""Max-norm: rows too long become as long as the limit, all others keep their bits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from twodice.dropout.maxnorm import max_norm_
from twodice.errors import ConfigError, ShapeError


def ramp(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 2, math.prod(shape)).reshape(shape)


def filled(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(ramp(*p.shape))
    return module


def incoming(module: nn.Module) -> list[torch.Tensor]:
    """The weights into each unit, one by one: the gradient of an output says which they are."""
    found = []
    sizes = {nn.ConvTranspose1d: (1, 4, 1), nn.Conv1d: (1, 4, 3), nn.Conv2d: (1, 4, 3, 3)}
    y = module(torch.ones(sizes.get(type(module), (1, 4))))
    for unit in range(y.shape[1]):
        (grad,) = torch.autograd.grad(y[0, unit].sum(), module.weight, retain_graph=True)  # type: ignore
        found.append(module.weight.detach()[grad != 0])  # type: ignore
    return found


LAYERS = {
    "linear": lambda: nn.Linear(4, 5),
    "convolution in groups": lambda: nn.Conv1d(4, 6, 3, groups=2),
    "image": lambda: nn.Conv2d(4, 5, 3),
    "transposed": lambda: nn.ConvTranspose1d(4, 6, 3),
    "transposed in groups": lambda: nn.ConvTranspose1d(4, 6, 3, groups=2),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_weights_into_each_unit_are_shortened_and_the_others_kept(name: str) -> None:
    module = filled(LAYERS[name]())
    before = incoming(module)
    norms = sorted(float(w.norm()) for w in before)
    c = (norms[1] + norms[-2]) / 2
    changed = max_norm_(module, c)
    assert 0 < int(changed) == sum(n > c for n in norms) < len(norms)
    for old, new in zip(before, incoming(module), strict=True):
        if old.norm() > c:
            assert torch.allclose(new, old * (c / old.norm())) and abs(float(new.norm()) - c) < 1e-5
        else:
            assert torch.equal(new, old)


def test_conv1d_of_transformers_has_its_units_in_the_columns() -> None:
    from transformers.pytorch_utils import Conv1D

    module = Conv1D(3, 2)
    module.weight.data = torch.tensor([[3.0, 0.3, 0.0], [4.0, 0.4, 0.0]])
    assert int(max_norm_(module, 2.5)) == 1
    assert torch.allclose(module.weight, torch.tensor([[1.5, 0.3, 0.0], [2.0, 0.4, 0.0]]))


def test_recurrent_nets_and_attention_have_all_their_matrices_in_bounds() -> None:
    for module in (
        nn.LSTM(3, 4, 2),
        nn.MultiheadAttention(4, 2),
        nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
    ):
        filled(module)
        biases = {n: p.clone() for n, p in module.named_parameters() if p.dim() == 1}
        assert max_norm_(module, 0.5) > 0
        for name, p in module.named_parameters():
            if p.dim() == 2:
                assert float(p.detach().norm(dim=1).max()) < 0.5 + 1e-6
            else:
                assert torch.equal(p, biases[name])


def test_lookups_are_left_alone_and_shared_weights_are_shortened_once() -> None:
    lookup, head = nn.Embedding(5, 3), nn.Linear(3, 4, bias=False)
    filled(lookup), filled(head)
    before, other = lookup.weight.detach().clone(), nn.Linear(3, 4, bias=False)
    other.weight = head.weight
    assert int(max_norm_(nn.ModuleList([lookup, head, other]), 0.5)) == int(
        (ramp(4, 3).norm(dim=1) > 0.5).sum()
    )
    assert torch.equal(lookup.weight, before)


def test_tensors_have_their_units_first_and_zeros_stay() -> None:
    weight = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    assert int(max_norm_([weight, weight], 1.0)) == 1
    assert torch.allclose(weight, torch.tensor([[0.0, 0.0], [0.6, 0.8]])) and weight.grad is None
    assert int(max_norm_(weight, math.inf)) == 0


def test_what_cannot_be_meant_is_an_error() -> None:
    for c in (0, -1.0, math.nan, True):
        with pytest.raises(ConfigError, match="above 0"):
            max_norm_(nn.Linear(2, 2), c)
    with pytest.raises(ConfigError, match="no matrix"):
        max_norm_(nn.LayerNorm(3), 1.0)
    with pytest.raises(ShapeError, match="axis of units"):
        max_norm_(torch.ones(3), 1.0)

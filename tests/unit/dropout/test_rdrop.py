"""R-Drop against a computation token by token and against the authors' snippet."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional

import twodice
from twodice.dropout.rdrop import r_drop_loss
from twodice.errors import ConfigError, ShapeError

A = torch.linspace(-2, 3, 2 * 3 * 5, dtype=torch.float64).reshape(2, 3, 5).sin() * 2
B = A.flip(0) + torch.linspace(0, 1, 5, dtype=torch.float64)
LABELS = torch.tensor([[0, 4, -100], [2, -100, 1]])


def slow(alpha: float, divergence: str) -> float:
    entropies, apart = [], []
    for row in range(2):
        for place in range(3):
            label = int(LABELS[row, place])
            if label == -100:
                continue
            p, q = A[row, place].softmax(-1).tolist(), B[row, place].softmax(-1).tolist()
            entropies.append(-(math.log(p[label]) + math.log(q[label])) / 2)
            both = sum(u * math.log(u / v) + v * math.log(v / u) for u, v in zip(p, q, strict=True))
            apart.append(both / 2)
    scale = 1 if divergence == "sum" else len(apart)
    return sum(entropies) / len(entropies) + alpha * sum(apart) / scale


@pytest.mark.parametrize("divergence", ["mean", "sum"])
@pytest.mark.parametrize("alpha", [0.0, 1.0, 4.5])
def test_the_loss_is_its_formula(alpha: float, divergence: str) -> None:
    ours = r_drop_loss(A, B, LABELS, alpha, divergence=divergence)  # type: ignore[arg-type]
    assert abs(float(ours) - slow(alpha, divergence)) < 1e-12
    assert torch.allclose(ours, r_drop_loss(B, A, LABELS, alpha, divergence=divergence))  # type: ignore


def test_sum_is_the_published_snippet() -> None:
    logits, other, labels = A.flatten(0, 1), B.flatten(0, 1), LABELS.flatten().clamp(min=0)
    p_loss = functional.kl_div(logits.log_softmax(-1), other.softmax(-1), reduction="none").sum()
    q_loss = functional.kl_div(other.log_softmax(-1), logits.softmax(-1), reduction="none").sum()
    entropy = 0.5 * (functional.cross_entropy(logits, labels) + functional.cross_entropy(other, labels))
    theirs = entropy + 0.7 * (p_loss + q_loss) / 2
    assert torch.allclose(r_drop_loss(logits, other, labels, 0.7, divergence="sum"), theirs)


def test_equal_passes_have_no_divergence_and_the_gradient_reaches_both() -> None:
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    assert torch.equal(r_drop_loss(a, a, LABELS, 9.0), r_drop_loss(a, a, LABELS, 0.0))
    assert torch.autograd.gradcheck(lambda a, b: r_drop_loss(a, b, LABELS, 2.0), (a, b))
    r_drop_loss(a, b, LABELS, 2.0).backward()
    ignored = LABELS == -100
    for grad in (a.grad, b.grad):
        assert grad is not None and not grad[ignored].any() and grad[~ignored].any()


def test_classes_that_are_shut_in_both_passes_and_half_precision() -> None:
    a, b = A.clone(), B.clone()
    a[..., 3] = b[..., 3] = -math.inf
    a.requires_grad_()
    loss = r_drop_loss(a, b, LABELS)
    loss.backward()
    assert loss.isfinite() and a.grad is not None and a.grad.isfinite().all()
    small = [x[..., [0, 1, 2, 4]] for x in (a, b)]
    labels = torch.where(LABELS == 4, 3, LABELS)
    assert torch.allclose(loss, r_drop_loss(*small, labels))
    half = r_drop_loss(A.bfloat16(), B.bfloat16(), LABELS)
    assert half.dtype == torch.float32 and abs(float(half) - slow(1.0, "mean")) < 0.05


def test_two_draws_of_a_step_are_two_passes() -> None:
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.1), nn.Linear(64, 3)).train()
    handle = twodice.attach(model, "dropout=0.5", seed=0)
    passes = []
    for draw in (0, 1, 0):
        with handle.step(3, examples=torch.arange(2), draw=draw):
            passes.append(model(torch.ones(2, 4)))
    handle.detach()
    labels = torch.tensor([0, 2])
    assert torch.equal(passes[0], passes[2])
    same = r_drop_loss(passes[0], passes[2], labels, 5.0) - r_drop_loss(passes[0], passes[2], labels, 0.0)
    assert same == 0 and r_drop_loss(passes[0], passes[1], labels, 5.0) > r_drop_loss(
        passes[0], passes[1], labels, 0
    )


def test_what_cannot_be_meant_is_an_error() -> None:
    for alpha in (-1.0, math.inf, math.nan, True):
        with pytest.raises(ConfigError, match="alpha must be"):
            r_drop_loss(A, B, LABELS, alpha)
    with pytest.raises(ConfigError, match="mean or sum"):
        r_drop_loss(A, B, LABELS, divergence="max")  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="one shape"):
        r_drop_loss(A, B[:1], LABELS)
    with pytest.raises(ShapeError, match="one shape"):
        r_drop_loss(A, B, LABELS[0])

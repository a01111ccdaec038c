"""Dropout under torch.func, vmap, forward-mode derivatives and derivatives of derivatives.

At fixed coordinates dropout is linear with a diagonal matrix, ``mask * scale``; every derivative is held
against that.
"""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jacfwd, jacrev, jvp, vjp, vmap

import twodice
from twodice.errors import ContractError
from twodice.kernels import dropout as kernel

SHAPE = (2, 2, 9)
SLOTS = torch.tensor([5, 9])


@pytest.fixture(autouse=True, params=["as it is", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "reference":
        monkeypatch.setattr(kernel, "_native", None)


def numbers(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drop(x: torch.Tensor) -> torch.Tensor:
    return twodice.dropout(x, 0.5, key=7, step=3, examples=SLOTS)


def add(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    return twodice.dropout_add(x, residual, 0.5, key=7, step=3, examples=SLOTS)


def diagonal() -> torch.Tensor:
    found = drop(torch.ones(SHAPE, dtype=torch.float64))
    assert found.unique().tolist() == [0.0, 2.0]
    return found


@pytest.mark.parametrize("leaf", [False, True])
def test_a_tangent_takes_the_mask_of_its_value(leaf: bool) -> None:
    x, tangent = numbers().requires_grad_(leaf), numbers(seed=1)
    with forward_ad.dual_level():
        y, along = forward_ad.unpack_dual(drop(forward_ad.make_dual(x, tangent)))
        assert along is not None
        z = forward_ad.unpack_dual(
            add(forward_ad.make_dual(x, tangent), forward_ad.make_dual(x, 3 * tangent))
        )
        only_x = forward_ad.unpack_dual(add(forward_ad.make_dual(x, tangent), numbers(seed=2)))
        only_residual = forward_ad.unpack_dual(add(numbers(seed=2), forward_ad.make_dual(x, tangent)))
        none = forward_ad.unpack_dual(drop(x)).tangent
    assert torch.equal(y, drop(x)) and torch.equal(along, diagonal() * tangent)
    assert torch.equal(z.tangent, 3 * tangent + diagonal() * tangent)
    assert torch.equal(only_x.tangent, diagonal() * tangent) and torch.equal(only_residual.tangent, tangent)
    assert none is None


def test_derivatives_of_torch_func_are_those_of_the_diagonal() -> None:
    x, other = numbers(), numbers(seed=1)
    full = torch.diag(diagonal().flatten())
    assert torch.equal(grad(lambda x: (drop(x) * other).sum())(x), diagonal() * other)
    assert torch.equal(jvp(drop, (x,), (other,))[1], diagonal() * other)
    assert torch.equal(vjp(drop, x)[1](other)[0], diagonal() * other)
    for jacobian in (jacrev, jacfwd):
        assert torch.equal(jacobian(drop)(x).reshape(full.shape), full)
        of_x, of_residual = jacobian(add, argnums=(0, 1))(x, other)
        assert torch.equal(of_x.reshape(full.shape), full)
        assert torch.equal(of_residual.reshape(full.shape), torch.eye(len(full), dtype=full.dtype))


@pytest.mark.parametrize("outer", [jacrev, jacfwd])
@pytest.mark.parametrize("inner", [jacrev, jacfwd])
def test_second_derivatives_in_every_order_of_the_modes(outer: object, inner: object) -> None:
    x = numbers()
    found = outer(inner(lambda x: drop(x).pow(2).sum()))(x).reshape(x.numel(), x.numel())
    assert torch.equal(found, torch.diag(2 * diagonal().flatten() ** 2))


def test_plain_autograd_goes_through_the_backward_pass_too() -> None:
    x, residual = (numbers(seed=seed).requires_grad_() for seed in (0, 1))
    (first,) = torch.autograd.grad(drop(x).pow(3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.allclose(second, 6 * drop(torch.ones_like(x)) ** 3 * x)
    assert torch.autograd.gradgradcheck(add, (x, residual), check_batched_grad=True)
    assert torch.autograd.gradcheck(
        add, (x, residual), check_forward_ad=True, check_batched_forward_grad=True, check_batched_grad=True
    )


def test_a_step_and_a_rate_in_tensors_have_derivatives_around_them() -> None:
    x, step, p = numbers(), torch.tensor(3), torch.tensor(0.5)
    run = lambda x: twodice.dropout(x, p, key=7, step=step, examples=SLOTS).sum()  # noqa: E731
    assert torch.equal(grad(run)(x), diagonal())


def test_vmap_with_mapped_coordinates_gives_what_a_loop_gives() -> None:
    x, residual, slots = numbers((4, *SHAPE)), numbers((4, *SHAPE), 1), torch.arange(8).view(4, 2)
    positions = torch.arange(8).view(4, 1, 2)

    def run(x: torch.Tensor, r: torch.Tensor, e: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return twodice.dropout_add(x, r, 0.5, key=7, step=3, examples=e, positions=t)

    wanted = torch.stack([run(*each) for each in zip(x, residual, slots, positions, strict=True)])
    assert torch.equal(vmap(run)(x, residual, slots, positions), wanted)
    assert wanted[0].ne(residual[0]).ne(wanted[1].ne(residual[1])).any()
    moved = vmap(run, in_dims=(1, 0, 1, 0))(x.transpose(0, 1), residual, slots.t(), positions)
    assert torch.equal(moved, wanted)
    steps = vmap(lambda s: twodice.dropout(x[0], 0.5, key=7, step=s))(torch.tensor([3, 4]))
    assert torch.equal(steps[1], twodice.dropout(x[0], 0.5, key=7, step=4))


def test_gradients_of_each_example_are_those_of_a_loop() -> None:
    weight, x, slots = numbers((20,)), numbers((4, 3, 20), 1), torch.tensor([3, 1, 4, 15])

    def loss(weight: torch.Tensor, x: torch.Tensor, slot: torch.Tensor) -> torch.Tensor:
        y = twodice.dropout((x * weight)[None], 0.5, key=7, step=3, examples=slot[None])
        return y.pow(2).sum()

    each = vmap(grad(loss), in_dims=(None, 0, 0))(weight, x, slots)
    assert torch.equal(each, torch.stack([grad(loss)(weight, *one) for one in zip(x, slots, strict=True)]))


def test_vmap_without_mapped_coordinates_is_an_error_unless_one_mask_is_meant() -> None:
    x = numbers((4, *SHAPE))
    for randomness in ("error", "different"):
        with pytest.raises(ContractError, match="must have coordinates of their own"):
            vmap(drop, randomness=randomness)(x)
    assert torch.equal(vmap(drop, randomness="same")(x), torch.stack([drop(one) for one in x]))


def test_rates_may_be_mapped_and_drop_subsets() -> None:
    x = torch.ones(SHAPE)
    run = lambda p: twodice.dropout(x, p, key=7, step=3)  # noqa: E731
    low, high = vmap(run, randomness="same")(torch.tensor([0.25, 0.5]))
    assert torch.equal(low, run(0.25)) and torch.equal(high, run(0.5))
    assert bool(((low == 0) <= (high == 0)).all())


def test_out_is_for_plain_calls() -> None:
    x = numbers()
    with forward_ad.dual_level(), pytest.raises(ContractError, match="serves plain calls only"):
        kernel.dropout(x, 20000, 7, 3, out=torch.empty_like(x))


def test_a_tangent_is_never_lost_in_compiled_code_and_subclasses() -> None:
    class Marked(torch.Tensor):
        pass

    with forward_ad.dual_level():
        dual = forward_ad.make_dual(numbers(), numbers(seed=1))
        for run in (
            lambda: drop(dual.as_subclass(Marked)),
            lambda: torch.compile(add, backend="eager")(dual, dual),
        ):
            with pytest.raises(ContractError, match="the tangent would be lost"):
                run()

"""The gradient, compiled code, and what the operation refuses."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from twodice.errors import ConfigError, ContractError, ShapeError
from twodice.kernels import dropout as kernel
from twodice.kernels.dropout import dropout
from twodice.random.draws import threshold
from twodice.random.keys import Key

SHAPES = {
    "btc": (2, 3, 9),
    "tbc": (3, 2, 9),
    "bc": (2, 9),
    "bhts": (2, 2, 3, 5),
    "bct": (2, 9, 3),
    "bchw": (2, 9, 2, 3),
}


@pytest.mark.parametrize("backend", ["as it is", "reference"])
@pytest.mark.parametrize("layout", SHAPES)
def test_gradcheck_at_a_fixed_key(layout: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "reference":
        monkeypatch.setattr(kernel, "_native", None)
    x = torch.linspace(-1, 2, math.prod(SHAPES[layout]), dtype=torch.float64).reshape(SHAPES[layout])
    residual = x.flip(0).clone().requires_grad_()
    x.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, r: dropout(x, 20000, 7, 3, layout=layout, residual=r), (x, residual)
    )


def test_the_backward_pass_selects_too() -> None:
    x = torch.ones(1, 4, 32, requires_grad=True)
    y = dropout(x, 32768, 7, 3)
    up = torch.full_like(y, float("inf"))
    (grad,) = torch.autograd.grad(y, x, up)
    assert torch.equal(grad == 0, y == 0) and (y == 0).any()


def test_nothing_of_the_size_of_the_input_is_kept() -> None:
    x = torch.ones(2, 4, 32, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        dropout(x, 6554, 7, 3, examples=torch.tensor([5, 6]), positions=torch.arange(4)[None])
    assert sum(t.numel() for t in saved) <= 2 + 4


def test_a_step_tensor_changed_before_the_backward_pass_does_no_harm() -> None:
    x = torch.ones(2, 4, 32, requires_grad=True)
    step, t = torch.tensor(3), torch.tensor(20000)
    y = dropout(x, t, 7, step)
    step += 1
    t += 1
    y.sum().backward()
    assert torch.equal(x.grad, y)  # type: ignore[arg-type]


def test_examples_changed_before_the_backward_pass_are_an_error() -> None:
    x = torch.ones(2, 4, 32, requires_grad=True)
    examples = torch.tensor([0, 1])
    y = dropout(x, 20000, 7, 3, examples=examples)
    examples += 1
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


def test_masks_are_nested_in_the_rate() -> None:
    x = torch.ones(4, 8, 64)
    dropped = [dropout(x, threshold(p), 7, 3) == 0 for p in (0.0, 0.05, 0.1, 0.2, 0.5, 0.9, 1.0)]
    assert all(bool((wide | ~narrow).all()) for narrow, wide in pairwise(dropped))
    assert not dropped[0].any() and dropped[-1].all()


def compiled_and_eager(backend: str) -> None:
    torch._dynamo.reset()
    graphs = 0

    def counting(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend(backend)(module, inputs)

    def layer(x: torch.Tensor, t: torch.Tensor, step: torch.Tensor, examples: torch.Tensor) -> torch.Tensor:
        return dropout(x * 1.0, t, Key(2**63 + 7), step, examples=examples, residual=x)

    run = torch.compile(layer, backend=counting, fullgraph=True)
    examples = torch.tensor([5, 9])
    for number in range(100):
        t, step = torch.tensor(threshold(number / 100)), torch.tensor(number)
        x = torch.linspace(-1, 1, 2 * 3 * 40).reshape(2, 3, 40).requires_grad_()
        ours, plain = run(x, t, step, examples), layer(x, t, step, examples)
        assert torch.equal(ours, plain)
        up = torch.linspace(0, 1, x.numel()).reshape(x.shape)
        assert torch.equal(torch.autograd.grad(ours, x, up)[0], torch.autograd.grad(plain, x, up)[0])
    assert graphs == 1


def test_a_schedule_of_100_rates_compiles_one_graph_with_the_bits_of_eager() -> None:
    compiled_and_eager("aot_eager")


@pytest.mark.slow
def test_inductor_gives_the_bits_of_eager_in_one_graph() -> None:
    compiled_and_eager("inductor")


def test_the_registered_operation_passes_torchs_own_checks() -> None:
    x = torch.linspace(-1, 1, 24).reshape(2, 3, 4).requires_grad_()
    one = torch.tensor(1)
    torch.library.opcheck(
        torch.ops.twodice.dropout.default,
        (x, x.detach(), one * 20000, one * 7, one * 3, None, None, None, "btc"),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_out_is_written_and_may_be_the_input() -> None:
    x = torch.linspace(-1, 1, 24).reshape(2, 3, 4)
    plain = dropout(x, 20000, 7, 3)
    assert dropout(x, 20000, 7, 3, out=x) is x
    assert torch.equal(x, plain)
    with pytest.raises(ContractError, match="need no gradient"):
        dropout(x.requires_grad_(), 20000, 7, 3, out=plain)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((2, 3), {}, "needs 3 dimensions"),
        ((2, 3, 4), {"layout": "btd"}, "did you mean 'btc'"),
        ((2, 3, 4), {"examples": torch.arange(3)}, "examples must be"),
        ((2, 3, 4), {"examples": torch.ones(2)}, "must be int64"),
        ((2, 3, 4), {"positions": torch.arange(3)}, "positions must be"),
        ((2, 3, 4), {"key_positions": torch.zeros(2, 4).long()}, "'bhts' only"),
        ((6, 4), {"layout": "nc"}, "needs examples and positions"),
        (
            (6, 4),
            {"layout": "nc", "examples": torch.arange(2), "positions": torch.zeros(2, 2).long()},
            "6 rows",
        ),
        ((2, 3, 4), {"residual": torch.ones(2, 3, 5)}, "residual must have"),
        ((2, 3, 4), {"residual": torch.ones(2, 3, 4, dtype=torch.float64)}, "residual must have"),
    ],
)
def test_what_does_not_fit_is_named(shape: tuple[int, ...], options: dict, message: str) -> None:
    with pytest.raises((ShapeError, ConfigError), match=message):
        dropout(torch.ones(shape), 1, 1, 1, **options)


def test_types_and_thresholds_that_are_not_served_are_named() -> None:
    with pytest.raises(ShapeError, match="int32"):
        dropout(torch.ones(2, 3, 4, dtype=torch.int32), 1, 1, 1)
    for t in (-1, 65537):
        with pytest.raises(ConfigError, match="threshold must be in"):
            dropout(torch.ones(2, 3, 4), t, 1, 1)


def test_nothing_is_fine() -> None:
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0)):
        assert dropout(torch.ones(shape), 6554, 1, 1).shape == shape

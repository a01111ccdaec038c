"""The public functions, and the name that they share with their package."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

from twodice.dropout.functional import dropout, dropout_add
from twodice.errors import ConfigError, ShapeError
from twodice.kernels.noise import Noise
from twodice.random.keys import Key

KEY = Key(7)


def test_what_is_kept_is_scaled_and_what_is_dropped_is_zero() -> None:
    y = dropout(torch.ones(4, 16, 64), 0.1, key=KEY, step=17)
    t = round(0.1 * 65536)
    assert set(y.unique().tolist()) == {0.0, float(torch.tensor(65536 / (65536 - t)))}


def test_a_dropped_infinity_or_nan_is_positive_zero() -> None:
    plain = dropout(torch.ones(2, 3, 64), 0.5, key=KEY, step=1)
    for value in (math.inf, -math.inf, math.nan, -1.0):
        y = dropout(torch.full((2, 3, 64), value), 0.5, key=KEY, step=1)
        gone = y[plain == 0]
        assert not gone.any() and not gone.signbit().any()
        assert (y[plain != 0] == value * 2).all() or math.isnan(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_dropout_add_is_dropout_and_an_addition(dtype: torch.dtype) -> None:
    x = torch.linspace(-3, 3, 2 * 5 * 40).reshape(2, 5, 40).to(dtype).requires_grad_()
    residual = x.detach().flip(0).mul(0.37).requires_grad_()
    for p in (0.0, 0.3, 1.0):
        fused = dropout_add(x, residual, p, key=KEY, step=5)
        plain = residual + dropout(x, p, key=KEY, step=5)
        assert torch.equal(fused, plain)
        up = torch.ones_like(fused)
        for a, b in zip(*(torch.autograd.grad(y, (x, residual), up) for y in (fused, plain)), strict=True):
            assert torch.equal(a, b)


def test_masks_do_not_depend_on_how_the_batch_is_cut() -> None:
    x = torch.ones(6, 5, 40)
    whole = dropout(x, 0.3, key=KEY, step=5)
    parts = [dropout(x[rows], 0.3, key=KEY, step=5, examples=rows) for rows in torch.arange(6).split(2)]
    assert torch.equal(whole, torch.cat(parts))
    later = dropout(x[:, 2:], 0.3, key=KEY, step=5, positions=torch.arange(2, 5)[None])
    assert torch.equal(whole[:, 2:], later)


def test_an_integer_key_is_the_key_of_that_seed() -> None:
    x = torch.ones(2, 3, 64)
    assert torch.equal(dropout(x, 0.5, key=7, step=1), dropout(x, 0.5, key=KEY, step=1))


def test_a_rate_in_a_tensor_is_the_same_rate() -> None:
    x = torch.ones(2, 3, 64)
    for p in (0.0, 1e-9, 0.1, 0.75, 1.0):
        tensor = dropout(x, torch.tensor(p, dtype=torch.float64), key=KEY, step=torch.tensor(4))
        assert torch.equal(tensor, dropout(x, p if p != 1e-9 else 0.0, key=KEY, step=4))


@pytest.mark.parametrize("p", [-0.1, 1.2, math.nan, 1e-9, 1 - 1e-9])
def test_a_rate_that_cannot_be_meant_is_an_error(p: float) -> None:
    with pytest.raises(ConfigError, match=r"p must be|constant p"):
        dropout(torch.ones(1, 1, 8), p, key=KEY, step=0)


IMPORTS = [
    "import twodice; f = twodice.dropout",
    "import twodice.dropout; f = twodice.dropout",
    "import twodice.dropout.functional; import twodice; f = twodice.dropout",
    "from twodice import dropout as f",
    "from twodice.dropout import functional; from twodice import dropout as f",
    "import twodice; twodice.dropout; f = twodice.dropout",
]


@pytest.mark.parametrize("imports", IMPORTS)
def test_the_package_answers_as_the_function_whichever_came_first(imports: str) -> None:
    code = f"{imports}\nimport torch\nprint(f(torch.ones(1, 1, 8), 0.5, key=7, step=17).tolist())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[[[2.0, 2.0, 0.0, 0.0, 0.0, 2.0, 0.0, 2.0]]]"


@pytest.mark.parametrize("rate", [1.2, -0.1, math.nan])
def test_a_rate_in_a_tensor_is_checked_as_one_that_is_typed(rate: float) -> None:
    with pytest.raises(ConfigError, match=r"\[0, 1\]"):
        dropout(torch.ones(1, 2, 8), torch.tensor(rate), key=1, step=0)


def test_a_rate_in_a_tensor_drops_what_the_same_rate_drops() -> None:
    x = torch.ones(2, 4, 64)
    for rate in (0.0, 1e-7, 0.1, 0.5, 1.0):
        given = dropout(x, torch.tensor(rate, dtype=torch.float64), key=1, step=0)
        assert torch.equal(given, dropout(x, 0.0 if rate == 1e-7 else rate, key=1, step=0))


def test_examples_may_be_a_list_and_anything_else_says_what_must_hold() -> None:
    x = torch.ones(2, 4, 64)
    as_tensor = dropout(x, 0.5, key=1, step=0, examples=torch.tensor([5, 3]))
    assert torch.equal(as_tensor, dropout(x, 0.5, key=1, step=0, examples=[5, 3]))
    for wrong in ([0.5, 1.0], "ab"):
        with pytest.raises(ShapeError, match="examples must be integers"):
            dropout(x, 0.5, key=1, step=0, examples=wrong)


@pytest.mark.parametrize("text", ["feature", "block(8)", "gaussian", "feature+gaussian"])
def test_a_noise_is_the_same_in_both_functions_and_by_its_text(text: str) -> None:
    x, residual = torch.linspace(-2, 2, 2 * 3 * 40).reshape(2, 3, 40), torch.ones(2, 3, 40)
    y = dropout(x, 0.3, key=KEY, step=5, noise=text)
    assert torch.equal(y, dropout(x, 0.3, key=KEY, step=5, noise=Noise.parse(text)))
    assert not torch.equal(y, dropout(x, 0.3, key=KEY, step=5))
    assert torch.equal(dropout_add(x, residual, 0.3, key=KEY, step=5, noise=text), residual + y)


@pytest.mark.parametrize("layout", ["bct", "bchw"])
def test_feature_noise_of_a_convolution_drops_whole_channels(layout: str) -> None:
    shape = (5, 64, 6) if layout == "bct" else (5, 64, 2, 3)
    y = dropout(torch.ones(shape), 0.4, key=KEY, step=5, layout=layout, noise="feature").flatten(2)
    assert torch.equal(y, y[..., :1].expand_as(y)) and 0.3 < float((y == 0).double().mean()) < 0.5
    rows = dropout(torch.ones(5, 64), 0.4, key=KEY, step=5, layout="bc")
    assert torch.equal(y[..., 0], rows)
    units = dropout(torch.ones(shape), 0.4, key=KEY, step=5, layout=layout).flatten(2)
    assert torch.equal(units[..., 0], rows) and not torch.equal(units[..., 1], rows)


def test_draws_do_not_depend_on_how_many_run_together() -> None:
    x = torch.linspace(-2, 2, 2 * 3 * 40).reshape(2, 3, 40)
    steps, slots = torch.arange(3).repeat_interleave(2), torch.arange(2).repeat(3)
    together = dropout(x.repeat(3, 1, 1), 0.3, key=KEY, step=steps, examples=slots)
    for draw in range(3):
        assert torch.equal(together[2 * draw : 2 * draw + 2], dropout(x, 0.3, key=KEY, step=draw))
    assert torch.equal(
        together, dropout(x.repeat(3, 1, 1), 0.3, key=KEY, step=steps.tolist(), examples=slots)
    )


def test_a_noise_that_cannot_be_meant_is_an_error() -> None:
    x = torch.ones(2, 3, 8)
    with pytest.raises(ConfigError, match="did you mean 'gaussian'"):
        dropout(x, 0.1, key=KEY, step=0, noise="gausian")
    with pytest.raises(ConfigError, match="below 1"):
        dropout(x, 1.0, key=KEY, step=0, noise="gaussian")
    with pytest.raises(ShapeError, match="one for each of the 2 rows"):
        dropout(x, 0.1, key=KEY, step=[1, 2, 3])
    with pytest.raises(ShapeError, match="residual must have"):
        dropout_add(x, x[:, :2], 0.1, key=KEY, step=0, noise="feature")

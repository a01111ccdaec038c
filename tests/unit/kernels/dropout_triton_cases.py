"""What dropout in Triton must be: the bits of its readable twin. Run by ``test_dropout_triton.py``.

By hand: TRITON_INTERPRET=1 python -m pytest tests/unit/kernels/dropout_triton_cases.py. Without that variable
the cases run on the GPU.
"""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.triton_kernels import DEVICE

from twodice.errors import ConfigError, ShapeError
from twodice.kernels import dropout as kernel
from twodice.kernels.dropout_layout import coordinates
from twodice.kernels.dropout_reference import dropout_reference
from twodice.kernels.dropout_triton import _TILE, dropout_triton, tile

TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WORD = 2**32 - 1
# The interpreter computes with numpy, which warns of values that become infinite or NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SHAPES = {
    "btc": [(1, 5, 1), (3, 2, 129), (1, 1, 2049)],
    "tbc": [(3, 2, 65)],
    "bc": [(7, 33)],
    "bhts": [(2, 3, 5, 77)],
    "bct": [(2, 40, 7)],
    "bchw": [(2, 9, 3, 5)],
}


def reference(
    x, t, key, step, examples=None, positions=None, key_positions=None, layout="btc", residual=None
):
    where = coordinates(x, layout, examples, positions, key_positions)
    return dropout_reference(x, t, key, step, where, layout, residual)


def ours(x, t, key, step, examples=None, positions=None, key_positions=None, layout="btc", residual=None):
    return dropout_triton(x, residual, t, key, step, examples, positions, key_positions, layout)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, where any NaN equals any NaN."""
    assert a.dtype == b.dtype and a.shape == b.shape
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    equal = a.contiguous().view(bits) == b.contiguous().view(bits)
    return bool((equal | (a.isnan() & b.isnan())).all())


def values(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Ordinary, huge, tiny, subnormal, infinite, negative zero and NaN."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    flat = x.view(-1)
    flat[3::17] *= 1e-6
    flat[4::37] *= 1e-39
    flat[5::19] *= 6e4
    flat[7::23] = float("inf")
    flat[11::29] = float("nan")
    flat[13::31] = -0.0
    return x.to(dtype).to(DEVICE)


@pytest.mark.parametrize("layout", SHAPES)
def test_every_layout(layout: str) -> None:
    for shape in SHAPES[layout]:
        x, residual = values(shape), values(shape, seed=1)
        for t, added in ((6554, None), (65535, residual)):
            result = ours(x, t, 2**63 + 12345, 17, layout=layout, residual=added)
            assert same_bits(result, reference(x, t, 2**63 + 12345, 17, layout=layout, residual=added)), shape
            assert result.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_type(dtype: torch.dtype) -> None:
    x, residual = values((3, 2, 129), dtype), values((3, 2, 129), dtype, 1)
    for t in (1, 6554, 65535):
        for added in (None, residual):
            assert same_bits(ours(x, t, 3, 4, residual=added), reference(x, t, 3, 4, residual=added)), t


def test_any_stride_and_offset() -> None:
    big = values((6, 12, 70))
    views = [
        big[:, :, 3:50], big[::2, 1::3, ::2], big.transpose(0, 2), big[:, :, :1].expand(6, 12, 20),
        big[1:2, 5:6, 7:], big.permute(1, 0, 2),
    ]  # fmt: skip
    for x in views:
        residual = values(tuple(x.shape), seed=2).transpose(0, 1).contiguous().transpose(0, 1)
        for layout in ("btc", "tbc", "bct"):
            options = {"layout": layout, "residual": residual}
            assert same_bits(ours(x, 20000, 3, 4, **options), reference(x, 20000, 3, 4, **options))
    image = values((2, 9, 6, 10))
    for x in (image.to(memory_format=torch.channels_last), image[:, :, ::2, ::3], image.transpose(2, 3)):
        assert same_bits(ours(x, 20000, 3, 4, layout="bchw"), reference(x, 20000, 3, 4, layout="bchw"))


def test_given_coordinates() -> None:
    x = values((3, 5, 30))
    one = torch.tensor([0, WORD, 12])
    packed = torch.arange(15).reshape(3, 5) * 285_212_671 % 2**32
    some = (None, one, packed, packed.t().contiguous().t(), one[:, None].expand(3, 5))
    for examples in some:
        for positions in (None, packed, packed[:1], torch.arange(5, dtype=torch.int32)[None]):
            options = {"examples": examples, "positions": positions}
            for key, step in ((2**64 - 1, WORD), (1, 0)):
                assert same_bits(
                    ours(x, 30000, key, step, **options), reference(x, 30000, key, step, **options)
                )
    flat = x.flatten(0, 1)
    for examples in (one, packed, packed.flatten()):
        options = {"examples": examples, "positions": packed, "layout": "nc"}
        assert same_bits(ours(flat, 30000, 1, 2, **options), reference(flat, 30000, 1, 2, **options))


def test_columns_of_attention_are_the_positions_of_the_keys() -> None:
    x = values((2, 3, 4, 37))
    mixed = torch.stack((torch.arange(37).flip(0), torch.arange(37) * 7919 % 2**23))
    mixed[1, 5] = 2**23 - 1
    first = torch.tensor([[13], [2**23 - 37]])
    some = mixed, mixed[:1], mixed.to(torch.int32), torch.arange(5, 42)[None], first, first[:1]
    for columns in some:
        options = {"layout": "bhts", "key_positions": columns, "residual": x * 2}
        assert same_bits(ours(x, 30000, 8, 9, **options), reference(x, 30000, 8, 9, **options))


def test_the_largest_head_and_column() -> None:
    x = values((1, 4096, 1, 9))
    assert same_bits(ours(x, 30000, 1, 2, layout="bhts"), reference(x, 30000, 1, 2, layout="bhts"))
    last = torch.tensor([[2**23 - 1]])
    x = torch.ones(1, 4096, 1, 1, device=DEVICE)
    options = {"layout": "bhts", "key_positions": last}
    assert same_bits(ours(x, 30000, 1, 2, **options), reference(x, 30000, 1, 2, **options))


def test_more_tiles_than_one_along_both_axes() -> None:
    x = values((3, 50, 1100))
    rows, columns = tile(1100)
    assert rows * columns == _TILE and columns < 1100 and rows < 150
    assert same_bits(ours(x, 30000, 1, 2), reference(x, 30000, 1, 2))


def test_a_schedule_of_rates_and_steps_in_tensors_on_the_device() -> None:
    x = values((2, 3, 50))
    for t, step in ((0, 0), (1, 2**31), (32768, WORD), (65536, 5)):
        tensors = torch.tensor(t, device=DEVICE), torch.tensor(step, device=DEVICE)
        twin = reference(x, t, 2**63, step)
        assert same_bits(ours(x, tensors[0], 2**63, tensors[1]), twin)
        assert same_bits(ours(x, t, 2**63, step), twin)
        assert same_bits(ours(x, tensors[0].to(torch.int32), 2**63, step), twin)


def test_all_dropped_and_none_dropped() -> None:
    x, residual = values((2, 3, 50)), values((2, 3, 50), seed=1)
    for t in (0, 65536):
        for added in (None, residual):
            assert same_bits(ours(x, t, 1, 2, residual=added), reference(x, t, 1, 2, residual=added))
    assert not ours(x, 65536, 1, 2).any()
    kept = ours(x, 0, 1, 2)
    assert same_bits(kept, x) and kept.data_ptr() != x.data_ptr()
    assert ours(x[:, :0], 5, 1, 2).shape == (2, 0, 50)


def test_the_scale_is_the_rounded_quotient_for_every_threshold() -> None:
    one = torch.ones(1, 1, 256, device=DEVICE)
    for t in (2, 3, 9973, 21845, 32767, 54321, 65534):
        for x in (one, one.double()):
            assert same_bits(ours(x, t, 7, 3), reference(x, t, 7, 3)), t


def test_the_result_may_be_written_over_the_input() -> None:
    x = values((2, 3, 50))
    twin = reference(x, 30000, 1, 2)
    assert dropout_triton(x, None, 30000, 1, 2, None, None, None, "btc", x) is x
    assert same_bits(x, twin)


@pytest.mark.parametrize("layout", ["btc", "bhts", "bct"])
def test_the_gradient_is_the_same_kernel_on_what_comes_from_above(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "_forward", dropout_triton)
    shape = {"btc": (2, 3, 9), "bhts": (2, 2, 3, 5), "bct": (2, 9, 3)}[layout]
    x = torch.linspace(-1, 2, math.prod(shape), dtype=torch.float64, device=DEVICE).reshape(shape)
    residual = x.flip(0).clone().requires_grad_()
    up = values(shape, torch.float64)
    y = kernel.dropout(x.requires_grad_(), 20000, 7, 3, layout=layout, residual=residual)
    by_x, by_residual = torch.autograd.grad(y, (x, residual), up)
    assert same_bits(by_x, reference(up, 20000, 7, 3, layout=layout)) and same_bits(by_residual, up)


def test_what_does_not_fit_is_named() -> None:
    x = torch.ones(2, 3, 8, device=DEVICE)
    with pytest.raises(ShapeError, match="examples must be"):
        ours(x, 1, 1, 1, examples=torch.arange(3))
    with pytest.raises(ShapeError, match="'bhts' only"):
        ours(x, 1, 1, 1, key_positions=torch.zeros(2, 8, dtype=torch.int64))
    if DEVICE != "cpu":
        return
    for bad in (-1, 2**32):
        with pytest.raises(ConfigError, match="example must be in"):
            ours(x, 1, 1, 1, examples=torch.tensor([0, bad]))

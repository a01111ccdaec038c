"""The native kernel gives the bits of its readable twin: over shapes, strides, types, bounds, threads and
levels.

In all about 10^7 decisions are compared.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from twodice.errors import ConfigError, ShapeError
from twodice.kernels import dispatch
from twodice.kernels import dropout as kernel

native = dispatch.native
pytestmark = pytest.mark.skipif(native is None, reason="no native module")
LEVELS = native.simd_levels() if native is not None else []
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WORD = 2**32 - 1


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    level, threads = native.simd(), torch.get_num_threads()
    yield
    native.set_simd(level)
    torch.set_num_threads(threads)


def reference(monkeypatch: pytest.MonkeyPatch, *args: object, **options: object) -> torch.Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "_native", None)
        patch.setattr(dispatch, "say_once_when_slow", lambda: None)
        return kernel.dropout(*args, **options)  # type: ignore[arg-type]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, where any NaN equals any NaN."""
    assert a.dtype == b.dtype and a.shape == b.shape
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    equal = a.contiguous().view(bits) == b.contiguous().view(bits)
    return bool((equal | (a.isnan() & b.isnan())).all())


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Ordinary, huge, tiny, infinite, negative zero and NaN."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    flat = x.view(-1)
    flat[3::17] *= 1e-6
    flat[5::19] *= 6e4
    flat[7::23] = float("inf")
    flat[11::29] = float("nan")
    flat[13::31] = -0.0
    return x.to(dtype)


SHAPES = {
    "btc": [(2, 3, 64), (1, 5, 1), (3, 2, 129), (2, 2, 16385)],
    "tbc": [(3, 2, 65)],
    "bc": [(7, 33), (1, 100_003)],
    "bhts": [(2, 3, 5, 77), (1, 2, 3, 512)],
    "bct": [(2, 40, 7)],
    "bchw": [(2, 9, 3, 5)],
}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_every_layout_type_and_level(level: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    native.set_simd(level)
    for layout, shapes in SHAPES.items():
        for shape in shapes:
            x, residual = values(shape, dtype), values(shape, dtype, 1)
            for t in (1, 6554, 65535):
                for added in (None, residual):
                    args = (x, t, 2**63 + 12345, 17)
                    ours = kernel.dropout(*args, layout=layout, residual=added)
                    twin = reference(monkeypatch, *args, layout=layout, residual=added)
                    assert same_bits(ours, twin), (layout, shape, t, added is not None)
                    assert ours.stride() == twin.stride()


@pytest.mark.parametrize("level", LEVELS)
def test_any_stride_and_offset(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    native.set_simd(level)
    big = values((6, 20, 140), torch.float32)
    views = [
        big[:, :, 3:90], big[::2, 1::3, ::2], big.transpose(0, 2), big[:, :, :1].expand(6, 20, 50), big[1:2,
        5:6, 7:], big[:, 0:1].expand(6, 9, 140), big.flip(2), big.permute(1, 0, 2),
    ]  # fmt: skip
    for x in views:
        residual = values(tuple(x.shape), torch.float32, 2).transpose(0, 1).contiguous().transpose(0, 1)
        for layout in ("btc", "tbc", "bct"):
            ours = kernel.dropout(x, 20000, 3, 4, layout=layout, residual=residual)
            assert same_bits(ours, reference(monkeypatch, x, 20000, 3, 4, layout=layout, residual=residual))
    image = values((2, 9, 6, 10), torch.float32)
    for x in (image.to(memory_format=torch.channels_last), image[:, :, ::2, ::3], image.transpose(2, 3)):
        assert same_bits(
            kernel.dropout(x, 20000, 3, 4, layout="bchw"),
            reference(monkeypatch, x, 20000, 3, 4, layout="bchw"),
        )


@pytest.mark.parametrize("level", LEVELS)
def test_given_coordinates(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    native.set_simd(level)
    x = values((3, 5, 70), torch.float32)
    one = torch.tensor([0, WORD, 12])
    packed = torch.arange(15).reshape(3, 5) * 285_212_671 % 2**32
    for examples in (
        None,
        one,
        packed,
        packed.t().contiguous().t(),
        one.to(torch.int64)[:, None].expand(3, 5),
    ):
        for positions in (None, packed, packed[:1], torch.arange(5, dtype=torch.int32)[None]):
            for step in (0, WORD):
                options = {"examples": examples, "positions": positions}
                ours = kernel.dropout(x, 30000, 2**64 - 1, step, **options)
                assert same_bits(ours, reference(monkeypatch, x, 30000, 2**64 - 1, step, **options))
    flat = x.flatten(0, 1)
    for examples in (one, packed, packed.flatten()):
        options = {"examples": examples, "positions": packed, "layout": "nc"}
        ours = kernel.dropout(flat, 30000, 1, 2, **options)
        assert same_bits(ours, reference(monkeypatch, flat, 30000, 1, 2, **options))
        full = examples.view(3, 5) if examples.numel() == 15 else examples
        assert same_bits(ours.view(3, 5, 70), kernel.dropout(x, 30000, 1, 2, examples=full, positions=packed))


@pytest.mark.parametrize("level", LEVELS)
def test_columns_of_attention_are_the_positions_of_the_keys(
    level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    native.set_simd(level)
    x = values((2, 3, 4, 37), torch.float32)
    whole = kernel.dropout(torch.ones(2, 3, 4, 64), 30000, 8, 9, layout="bhts")
    for start in (0, 3, 8, 27):
        columns = torch.arange(start, start + 37)
        part = kernel.dropout(
            torch.ones(2, 3, 4, 37), 30000, 8, 9, layout="bhts", key_positions=columns[None]
        )
        assert torch.equal(part, whole[..., start : start + 37])
    mixed = torch.stack((torch.arange(37).flip(0), torch.arange(37) * 7919 % 2**23))
    mixed[1, 5] = 2**23 - 1
    same = torch.tensor([[5], [8]]).expand(2, 37)
    for columns in (mixed, mixed[:1], mixed.to(torch.int32), same):
        options = {"layout": "bhts", "key_positions": columns, "residual": x * 2}
        ours = kernel.dropout(x, 30000, 8, 9, **options)
        assert same_bits(ours, reference(monkeypatch, x, 30000, 8, 9, **options))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", TYPES)
def test_columns_follow_where_of_each_row_the_first_is_given(
    level: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    native.set_simd(level)
    for S in (1, 37, 128, 20_000):
        x = values((3, 2, 2, S), dtype)
        for first in (torch.tensor([[0], [13], [2**23 - S]]), torch.tensor([[40]]), torch.tensor([[3]])):
            options = {"layout": "bhts", "residual": x * 2}
            ours = kernel.dropout(x, 30000, 8, 9, key_positions=first, **options)
            all_of_them = first + torch.arange(S)
            assert same_bits(ours, kernel.dropout(x, 30000, 8, 9, key_positions=all_of_them, **options))
        assert same_bits(ours, reference(monkeypatch, x, 30000, 8, 9, key_positions=first, **options))
        if S > 1:
            for bad in (-1, 2**23 - S + 1):
                with pytest.raises(ConfigError, match="column must be in"):
                    kernel.dropout(x, 30000, 8, 9, layout="bhts", key_positions=torch.tensor([[bad]]))


@pytest.mark.parametrize("level", LEVELS)
def test_any_number_of_threads(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    native.set_simd(level)
    for shape in ((2, 257, 1001), (1, 1, 500_009)):
        x = values(shape, torch.float32)
        twin = reference(monkeypatch, x, 6554, 7, 3)
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            assert same_bits(kernel.dropout(x, 6554, 7, 3), twin), threads


@pytest.mark.parametrize("level", LEVELS)
def test_results_that_pass_the_caches(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    native.set_simd(level)
    for dtype in TYPES:
        for columns in (256, 250):
            x = values((2, 100, columns), dtype)
            twin = kernel.dropout(x, 6554, 7, 3)
            with monkeypatch.context() as patch:
                patch.setattr(kernel, "_STREAM_BYTES", 1)
                assert same_bits(kernel.dropout(x, 6554, 7, 3), twin)


def test_the_largest_head_and_column(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(1, 4096, 1, 9)
    assert same_bits(
        kernel.dropout(x, 30000, 1, 2, layout="bhts"), reference(monkeypatch, x, 30000, 1, 2, layout="bhts")
    )
    last = torch.tensor([[2**23 - 1]])
    wide = kernel.dropout(torch.ones(1, 2**23), 30000, 1, 2, layout="bc")
    one = kernel.dropout(torch.ones(1, 1, 1, 1), 30000, 1, 2, layout="bhts", key_positions=last)
    assert float(wide[0, -1]) == float(one)
    with pytest.raises(ConfigError, match="head must be in"):
        kernel.dropout(torch.ones(1, 4097, 1, 1), 1, 1, 2, layout="bhts")
    with pytest.raises(ConfigError, match="column must be in"):
        kernel.dropout(torch.ones(1, 1).expand(1, 2**23 + 1), 1, 1, 2, layout="bc")


def test_coordinates_out_of_bounds_are_named_by_both_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(2, 3, 8)
    keys = torch.ones(2, 1, 3, 8)
    for call in (kernel.dropout, lambda *a, **k: reference(monkeypatch, *a, **k)):
        for bad in (-1, 2**32):
            with pytest.raises(ConfigError, match="example must be in"):
                call(x, 1, 1, 1, examples=torch.tensor([0, bad]))
            with pytest.raises(ConfigError, match="position must be in"):
                call(x, 1, 1, 1, positions=torch.tensor([[0, 1, bad]]))
            with pytest.raises(ConfigError, match="step must be in"):
                call(x, 1, 1, bad)
        with pytest.raises(ConfigError, match="column must be in"):
            call(keys, 1, 1, 1, layout="bhts", key_positions=torch.full((1, 8), 2**23))


@pytest.mark.parametrize(("shape", "threshold"), [((2, 3, 8), 65536), ((2, 3, 0), 1)])
def test_coordinates_are_checked_also_where_no_kernel_runs(
    shape: tuple[int, ...], threshold: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.ones(shape)
    for call in (kernel.dropout, lambda *a, **k: reference(monkeypatch, *a, **k)):
        with pytest.raises(ConfigError, match="example must be in"):
            call(x, threshold, 1, 1, examples=torch.tensor([0, -1]))
        with pytest.raises(ShapeError, match="examples must be"):
            call(x, threshold, 1, 1, examples=torch.arange(3))
        with pytest.raises(ShapeError, match="'bhts' only"):
            call(x, threshold, 1, 1, key_positions=torch.zeros(2, 8, dtype=torch.int64))


def test_a_step_is_an_integer_and_no_fraction_of_one() -> None:
    x = torch.ones(2, 3, 8)
    for step in (1.5, torch.tensor(1.5), "1"):
        with pytest.raises(ConfigError, match="step must be an integer"):
            kernel.dropout(x, 32768, 1, step)
    for step in (np.int64(3), torch.tensor(3)):
        assert same_bits(kernel.dropout(x, 32768, 1, step), kernel.dropout(x, 32768, 1, 3))


def test_all_dropped_and_none_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    x, residual = values((2, 3, 50), torch.float32), values((2, 3, 50), torch.float32, 1)
    for t in (0, 65536):
        for added in (None, residual):
            ours = kernel.dropout(x, t, 1, 2, residual=added)
            assert same_bits(ours, reference(monkeypatch, x, t, 1, 2, residual=added))
    assert not kernel.dropout(x, 65536, 1, 2).any()
    kept = kernel.dropout(x, 0, 1, 2)
    assert same_bits(kept, x) and kept.data_ptr() != x.data_ptr()


def test_a_child_made_by_fork_has_threads_of_its_own() -> None:
    torch.set_num_threads(2)
    x = torch.ones(1, 2048, 256)
    twin = kernel.dropout(x, 6554, 7, 3).numpy().tobytes()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads and fork: the very thing in question
        child = os.fork()
    if child == 0:
        os._exit(0 if kernel.dropout(x, 6554, 7, 3).numpy().tobytes() == twin else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_an_unknown_instruction_set_is_an_error() -> None:
    from twodice.errors import BackendError

    with pytest.raises(BackendError, match="instruction set must be one of portable"):
        dispatch.set_simd(native, "sse9")

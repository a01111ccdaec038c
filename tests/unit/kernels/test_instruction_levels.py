"""Every instruction set that this machine has gives the same bits as the portable loops.

The other tests of this folder hold levels against the readable twins; here they are held against each other,
through the public functions with their gradients, over every length of the last columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from tests.support import sampling_rows

import twodice
from twodice.kernels import dispatch
from twodice.kernels.sampling_settings import NEEDS

native = dispatch.native
pytestmark = pytest.mark.skipif(native is None, reason="no native module")
LEVELS = native.simd_levels() if native is not None else []
TYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    level, threads = native.simd(), torch.get_num_threads()
    yield
    native.set_simd(level)
    torch.set_num_threads(threads)


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor; every NaN counts as one, whose payload IEEE 754 leaves open."""
    if not x.is_floating_point():
        return x
    quiet = torch.where(x.isnan(), torch.full_like(x, torch.nan), x)
    return quiet.contiguous().view(BITS[x.element_size()])


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Ordinary, huge, tiny, infinite, negative zero and NaN."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    flat = x.view(-1)
    for start, special in ((3, 1e-6), (5, 6e4), (7, 1e-41), (9, 3e38)):
        flat[start :: 16 + start] *= special
    for start, special in ((11, torch.inf), (13, -torch.inf), (15, torch.nan), (17, -0.0)):
        flat[start :: 16 + start] = special
    return x.to(dtype)


def differing(level: str, run: Callable[[], list[torch.Tensor]]) -> int:
    """How many of the results of `run` differ between the portable loops and this level."""
    found = []
    for name in (LEVELS[0], level):
        dispatch.set_simd(native, name)
        assert native.simd() == name
        found.append([bits(y) for y in run()])
    assert len(found[0]) == len(found[1])
    return sum(not torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("level", LEVELS[1:])
def test_dropout_forward_backward_and_with_a_residual(level: str, dtype: torch.dtype) -> None:
    def run() -> list[torch.Tensor]:
        out = []
        for columns in [*range(1, 131), 1000, 16_384 + 65]:
            base = values((2, 3, columns + 1), dtype, columns)
            for x in (base[..., 1:], base[..., :columns].contiguous()):  # not aligned, aligned
                x = x.detach().requires_grad_()
                residual = values((2, 3, columns), dtype, columns + 1).requires_grad_()
                up = values((2, 3, columns), dtype, columns + 2)
                for p in (0.1, 0.75):
                    y = twodice.dropout(x, p, key=columns, step=3)
                    z = twodice.dropout_add(x, residual, p, key=columns, step=3)
                    out += [y, z, *torch.autograd.grad(y, x, up), *torch.autograd.grad(z, (x, residual), up)]
        return [y.detach() for y in out]

    assert differing(level, run) == 0


@pytest.mark.parametrize("level", LEVELS[1:])
def test_dropout_of_attention_weights_whose_keys_stand_anywhere(level: str) -> None:
    def run() -> list[torch.Tensor]:
        out = []
        for keys in (1, 7, 31, 33, 64, 100):
            x = values((2, 3, 5, keys), torch.float32, keys)
            where = torch.arange(2 * keys).view(2, keys) * 7919 % 2**23
            out.append(twodice.dropout(x, 0.3, key=1, step=2, layout="bhts", key_positions=where))
            turned = x.transpose(2, 3).contiguous().transpose(2, 3)
            out.append(twodice.dropout(turned, 0.3, key=1, step=2, layout="bhts"))
        return out

    assert differing(level, run) == 0


@pytest.mark.parametrize("level", LEVELS[1:])
def test_dropout_on_two_threads_past_the_caches(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twodice.kernels.dropout._STREAM_BYTES", 1)
    torch.set_num_threads(2)
    inputs = [values((2, 300, columns), dtype, 5) for dtype in TYPES for columns in (512, 500)]
    assert differing(level, lambda: [twodice.dropout(x, 0.1, key=7, step=3) for x in inputs]) == 0


@pytest.mark.parametrize("level", LEVELS[1:])
def test_every_choice_and_every_set_in_sampling(level: str) -> None:
    def run() -> list[torch.Tensor]:
        out = []
        for number in range(60):
            rows, vocabulary = 16, (1, 7, 8, 129, 130, 257, 1000)[number % 7]
            found = twodice.sample(
                sampling_rows.batch(number, rows, vocabulary),
                sampling_rows.settings(number, rows, vocabulary),
                torch.arange(rows) + number,
                history=sampling_rows.history(number, rows, vocabulary),
                need=NEEDS,
                on_bad_row="flag",
            )
            out += [found.tokens, found.status, found.rank, *found.kept]
        return out

    assert differing(level, run) == 0


def test_the_comparison_sees_one_bit() -> None:
    turn = iter((1.0, 1.0 + 2**-23))
    assert differing(LEVELS[0], lambda: [torch.tensor(next(turn))]) == 1

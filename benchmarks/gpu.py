"""The Triton kernels on a GPU: against a copy of the same bytes, and torch eager, compiled and flash.

Times are taken by events on the device, peaks of memory by torch's allocator, both over whole calls that
allocate their results on both sides. dropout + residual reads two tensors and writes one, so its limit is a
copy of half as many elements again, which moves the same bytes. Where there is no GPU the module says so and
measures nothing.

Run: python -m benchmarks.gpu
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import dropout as peer
from torch.nn.functional import scaled_dot_product_attention as sdpa

from benchmarks.sidebyside import Row, table
from twodice.kernels.attention import attention
from twodice.kernels.dropout import dropout

T = 6554
P = 0.1
Contenders = Mapping[str, Callable[[Any], Any]]


def on_device(
    contenders: Contenders, inputs: Sequence[Any], rounds: int = 15, calls: int = 20
) -> dict[str, float]:
    """Return the median seconds a call of each contender, in turn, between two events on the device."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for call in contenders.values():
        for _ in range(3):  # compilation, and the choice of an algorithm
            call(inputs[0])
    for _ in range(rounds):
        for name, call in contenders.items():
            turns = itertools.cycle(inputs)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                call(next(turns))
            end.record()
            torch.cuda.synchronize()
            found[name].append(start.elapsed_time(end) / 1e3 / calls)
    return {name: statistics.median(values) for name, values in found.items()}


def peaks(contenders: Contenders, value: Any) -> dict[str, float]:
    """Return how many MiB each contender takes beyond its inputs at its peak."""
    found = {}
    for name, call in contenders.items():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call(value)
        torch.cuda.synchronize()
        found[name] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return found


def of_dropout(up: torch.Tensor, *, gradient: bool) -> Contenders:
    """dropout + residual of (x, residual), and one copy that moves the same bytes (forward only)."""

    def eager(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return residual + peer(x, P)

    def ours(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        return dropout(x, T, 7, 3, residual=residual)

    ways = {"twodice": ours, "eager": eager, "compiled": torch.compile(eager)}
    if gradient:
        return {
            name: lambda pair, way=way: torch.autograd.grad(way(*pair), pair, up)
            for name, way in ways.items()
        }
    source = torch.empty(up.numel() * 3 // 2, dtype=up.dtype, device=up.device)
    calls: dict[str, Callable[[Any], Any]] = {
        name: lambda pair, way=way: way(*pair) for name, way in ways.items()
    }
    return calls | {"copy": lambda _: source.clone()}


def of_attention(up: torch.Tensor, *, materialised: bool = True) -> Contenders:
    """Causal attention of (query, key, value) with dropout, forward and backward.

    `materialised` takes in the two that make the weights, for T where they fit.
    """

    def eager(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        return peer(torch.softmax(scores.masked_fill(hidden, float("-inf")), -1), P) @ value

    def flash(p: float) -> Callable[..., torch.Tensor]:
        def run(*inputs: torch.Tensor) -> torch.Tensor:
            with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
                return sdpa(*inputs, dropout_p=p, is_causal=True)

        return run

    ways: dict[str, Callable[..., torch.Tensor]] = {
        "twodice": lambda *inputs: attention(*inputs, T, 7, 3, causal=True),
        "twodice p=0": lambda *inputs: attention(*inputs, 0, 7, 3, causal=True),
        "flash p=0.1": flash(P),
        "flash p=0": flash(0.0),
    }
    if materialised:
        ways |= {"eager": eager, "compiled": torch.compile(eager)}
    return {
        name: lambda inputs, way=way: torch.autograd.grad(way(*inputs), inputs, up)
        for name, way in ways.items()
    }


def leaves(count: int, *shape: int, dtype: torch.dtype, device: str = "cuda") -> tuple[torch.Tensor, ...]:
    """Normal inputs that take gradients."""
    return tuple(torch.randn(shape, dtype=dtype, device=device).requires_grad_() for _ in range(count))


def dropout_rows() -> tuple[list[Row], list[tuple[str, dict[str, float]]]]:
    """Times and peaks of dropout + residual, from 1 MiB to 256 MiB a tensor."""
    rows, memory = [], []
    for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        for tokens, width in ((256, 1024), (4096, 1024), (16384, 4096)):
            inputs = [leaves(2, 1, tokens, width, dtype=dtype) for _ in range(4)]
            up = torch.randn(1, tokens, width, dtype=dtype, device="cuda")
            for gradient in (False, True):
                case = f"{name} {tokens} x {width}, {'forward + backward' if gradient else 'forward'}"
                contenders = of_dropout(up, gradient=gradient)
                with torch.set_grad_enabled(gradient):
                    rows.append(Row(case, on_device(contenders, inputs), 0))
                    memory.append((case, peaks(contenders, inputs[0])))
    return rows, memory


def attention_rows() -> tuple[list[Row], list[tuple[str, dict[str, float]]]]:
    """Times and peaks of attention, bfloat16, about as many tokens in each case."""
    rows, memory = [], []
    for places, width in ((512, 64), (2048, 64), (2048, 128), (8192, 128)):
        shape = (16384 // places, 16, places, width)
        inputs = [leaves(3, *shape, dtype=torch.bfloat16) for _ in range(2)]
        up = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        case = f"bfloat16 {shape}, causal"
        contenders = of_attention(up, materialised=places <= 2048)
        rows.append(Row(case, on_device(contenders, inputs, rounds=9, calls=5), 0))
        memory.append((case, peaks(contenders, inputs[0])))
    return rows, memory


def memory_table(title: str, rows: Sequence[tuple[str, Mapping[str, float]]], names: Sequence[str]) -> None:
    """Print the peaks in MiB."""
    print(f"\n{title}\n{'case':<44}" + "".join(f"{name:>14}" for name in names))
    for case, found in rows:
        print(f"{case:<44}" + "".join(f"{found[n]:>14.1f}" if n in found else f"{'':>14}" for n in names))


def main() -> None:
    """Print the tables, or in one line why there are none."""
    if not torch.cuda.is_available():
        print("no GPU is at hand: the Triton kernels were not measured")
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__} (the column of threads does not apply)")
    rows, memory = dropout_rows()
    table("dropout + residual", rows, "twodice", ["copy", "eager", "compiled"])
    memory_table("peak beyond the inputs, MiB", memory, ["twodice", "copy", "eager", "compiled"])
    rows, memory = attention_rows()
    names = ["twodice p=0", "flash p=0.1", "flash p=0", "eager", "compiled"]
    table("attention with dropout 0.1, forward + backward", rows, "twodice", names)
    memory_table("peak beyond the inputs, MiB", memory, ["twodice", *names])


if __name__ == "__main__":
    main()

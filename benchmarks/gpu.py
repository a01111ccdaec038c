"""The Triton kernels on a GPU: against a read or copy of the same bytes, and what torch has.

Times are taken by events on the device, peaks of memory by torch's allocator, both over whole calls that
allocate their results on both sides. dropout + residual reads two tensors and writes one, so its limit is a
copy of half as many elements again, which moves the same bytes; that of sampling is one max over the logits,
which reads them once. Where there is no GPU the module says so and
measures nothing.

Run: python -m benchmarks.gpu
"""

from __future__ import annotations

import importlib.util
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
from twodice.sampling.params import SamplingParams
from twodice.sampling.sample import sample

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


def of_sampling(rows: int, k: int | None, p: float | None) -> Contenders:
    """One token for each row of float32 logits at temperature 0.8, with top-k, top-p, both or none."""
    settings = {name: value for name, value in (("top_k", k), ("top_p", p)) if value is not None}
    params = tuple(SamplingParams(temperature=0.8, seed=i, **settings) for i in range(rows))  # type: ignore[arg-type]
    counter = itertools.count()

    def ours(x: torch.Tensor) -> torch.Tensor:
        return sample(x, params[0] if rows == 1 else params, next(counter)).tokens

    def sort(x: torch.Tensor) -> torch.Tensor:
        """As engines do it in torch: sort, mask what top-k and top-p cut off, softmax, draw."""
        ordered, ids = (x / 0.8).sort(1)
        if k is not None:
            ordered = ordered.masked_fill(ordered < ordered[:, -k, None], float("-inf"))
        if p is not None:
            gone = ordered.softmax(1).cumsum(1) <= 1 - p
            gone[:, -1] = False
            ordered = ordered.masked_fill(gone, float("-inf"))
        return ids.gather(1, torch.multinomial(ordered.softmax(1), 1))

    def topk(x: torch.Tensor) -> torch.Tensor:
        values, ids = x.topk(k or 1)
        return ids.gather(1, torch.multinomial((values / 0.8).softmax(1), 1))

    ways: dict[str, Callable[[Any], Any]] = {"twodice": ours, "max": lambda x: x.amax(1), "sort": sort}
    if k is not None and p is None:
        ways["topk"] = topk
    if importlib.util.find_spec("flashinfer") is not None:
        import flashinfer.sampling as peer_sampling

        def flashinfer(x: torch.Tensor) -> torch.Tensor:
            chance = (x / 0.8).softmax(1)
            if k is not None and p is not None:
                return peer_sampling.top_k_top_p_sampling_from_probs(chance, k, p)
            if k is not None:
                return peer_sampling.top_k_sampling_from_probs(chance, k)
            if p is not None:
                return peer_sampling.top_p_sampling_from_probs(chance, p)
            return peer_sampling.sampling_from_probs(chance)

        ways["flashinfer"] = flashinfer
    return ways


def sampling_rows() -> list[Row]:
    """Times of sampling at a vocabulary of 151,936; whole calls, 64 or more rows in rotation."""
    found = []
    for rows in (1, 8, 32, 128, 256, 1024):
        for kind in ("normal", "peaked"):
            inputs = [2 * torch.randn(rows, 151_936, device="cuda") for _ in range(max(2, 64 // rows))]
            if kind == "peaked":  # a handful of tokens well above the rest, as in text
                for x in inputs:
                    at = torch.randint(0, x.shape[1], (rows, 20), device="cuda")
                    x.scatter_add_(1, at, torch.linspace(18, 4, 20, device="cuda").expand(rows, 20))
            for name, k, p in (
                ("top-k 50", 50, None),
                ("top-p 0.95", None, 0.95),
                ("top-k 50, top-p 0.95", 50, 0.95),
                ("no filter", None, None),
            ):
                contenders = of_sampling(rows, k, p)
                found.append(Row(f"{name}, {kind}, {rows} rows", on_device(contenders, inputs), 0))
    return found


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
    table("sampling, float32", sampling_rows(), "twodice", ["max", "sort", "topk", "flashinfer"])
    rows, memory = attention_rows()
    names = ["twodice p=0", "flash p=0.1", "flash p=0", "eager", "compiled"]
    table("attention with dropout 0.1, forward + backward", rows, "twodice", names)
    memory_table("peak beyond the inputs, MiB", memory, ["twodice", *names])


if __name__ == "__main__":
    main()

"""Dropout against `torch.nn.functional.dropout` and against one pass of multiply by a constant.

Two numbers bound it, for each float32 element: 8 bytes of memory traffic (read 4, write 4; an ordinary store
also reads the line that it overwrites, which makes 12) and about 3.5 vector operations with AVX2
(Philox4x32-10: 2 products, 2 shifts and 4 exclusive ors a round, 8 full and 2 half rounds, for 4 counters of
8 lanes, so 72 / 32 = 2.3; then widening the mask, product, selection, load and store). Below the caches the
operations bind, beyond them the bytes, where stores that pass the caches save the third part.

Run: python -m benchmarks.dropout
"""

from __future__ import annotations

import torch

from benchmarks.sidebyside import Row, alternate, table
from twodice.kernels.dropout import dropout as ours

T = 6554


def against_the_peer() -> list[Row]:
    """Both allocate their result; sizes from 4 KB up, forward, then forward and backward."""
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
            for shape in ((1, 16, 64), (1, 64, 256), (4, 128, 256), (8, 128, 1024)):
                count = 64 if shape[-1] < 1024 else 8
                inputs = [torch.randn(shape).to(dtype) for _ in range(count)]
                size = inputs[0].numel()
                rows.append(
                    Row(
                        f"{name} {size} elements, forward",
                        alternate(
                            {
                                "twodice": lambda x: ours(x, T, 7, 3),
                                "F.dropout": lambda x: torch.nn.functional.dropout(x, 0.1),
                                "multiply": lambda x: torch.mul(x, 1.1),
                            },
                            inputs,
                        ),
                        threads,
                    )
                )
        leaves = [torch.randn(8, 128, 256, requires_grad=True) for _ in range(8)]
        up = torch.randn(8, 128, 256)
        rows.append(
            Row(
                f"float32 {up.numel()} elements, forward + backward",
                alternate(
                    {
                        "twodice": lambda x, up=up: torch.autograd.grad(ours(x, T, 7, 3), x, up),
                        "F.dropout": lambda x, up=up: torch.autograd.grad(
                            torch.nn.functional.dropout(x, 0.1), x, up
                        ),
                        "multiply": lambda x, up=up: torch.autograd.grad(torch.mul(x, 1.1), x, up),
                    },
                    leaves,
                ),
                threads,
            )
        )
    return rows


def against_memory() -> list[Row]:
    """Larger than the caches, results given on both sides: how many times the time of one multiplication."""
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
            inputs = [torch.randn(32, 1024, 1024).to(dtype) for _ in range(2)]
            out = torch.empty_like(inputs[0])
            rows.append(
                Row(
                    f"{name} {out.numel() >> 20} M elements, result given",
                    alternate(
                        {
                            "twodice": lambda x, out=out: ours(x, T, 7, 3, out=out),
                            "multiply": lambda x, out=out: torch.mul(x, 1.1, out=out),
                        },
                        inputs,
                        rounds=9,
                    ),
                    threads,
                )
            )
    return rows


def main() -> None:
    """Print both tables."""
    before = torch.get_num_threads()
    try:
        table("dropout, result allocated", against_the_peer(), "twodice", ["F.dropout", "multiply"])
        table("dropout, larger than the caches", against_memory(), "twodice", ["multiply"])
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    main()

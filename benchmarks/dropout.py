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
# Of one tensor, from 4 KB to 256 MB.
BYTES = (1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 28)


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


def _plain(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.dropout(x, 0.1)


def _added(x: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
    return stream + torch.nn.functional.dropout(x, 0.1)


def by_bytes(threads: tuple[int, ...] = (1, 2), sizes: tuple[int, ...] = BYTES) -> list[Row]:
    """Forward and backward, alone and added to a residual stream, by the bytes of one tensor.

    A copy is one of the tensor forward and one of its gradient backward: the least bytes that the plain form
    moves; with a stream one more tensor is read, so there 1.5 copies forward are the least.
    """
    rows, grad = [], torch.autograd.grad
    for count in threads:
        torch.set_num_threads(count)
        # Compiled code keeps the number of threads it was made for.
        torch._dynamo.reset()
        plain, added = (torch.compile(f, dynamic=True) for f in (_plain, _added))
        for dtype, name in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
            for size in sizes:
                width = min(1024, size // dtype.itemsize // 16)
                shape = (1, size // dtype.itemsize // width, width)
                few = 64 if size <= 1 << 16 else 8 if size <= 1 << 24 else 1
                xs = [torch.randn(shape).to(dtype).requires_grad_() for _ in range(few)]
                stream, up = torch.randn(shape).to(dtype).requires_grad_(), torch.randn(shape).to(dtype)
                rounds = 3 if size > 1 << 24 else 9
                alone = {
                    "twodice": lambda x, up=up: grad(ours(x, T, 7, 3), x, up),
                    "F.dropout": lambda x, up=up: grad(_plain(x), x, up),
                    "compiled": lambda x, up=up, plain=plain: grad(plain(x), x, up),
                    "copy": lambda x, up=up: (x.detach().clone(), up.clone()),
                }
                both = {
                    "twodice": lambda x, s=stream, up=up: grad(ours(x, T, 7, 3, residual=s), (x, s), up),
                    "F.dropout": lambda x, s=stream, up=up: grad(_added(x, s), (x, s), up),
                    "compiled": lambda x, s=stream, up=up, added=added: grad(added(x, s), (x, s), up),
                    "copy": alone["copy"],
                }
                amount = f"{size >> 20} MB" if size >> 20 else f"{size >> 10} KB"
                for form, each in (("dropout", alone), ("dropout_add", both)):
                    times = alternate(each, xs, rounds=rounds, seconds=0.02)
                    rows.append(Row(f"{name} {amount}, {form}, forward + backward", times, count))
    return rows


def main() -> None:
    """Print the tables."""
    before = torch.get_num_threads()
    try:
        table("dropout, result allocated", against_the_peer(), "twodice", ["F.dropout", "multiply"])
        table("by the bytes of one tensor", by_bytes(), "twodice", ["F.dropout", "compiled", "copy"])
        table("dropout, larger than the caches", against_memory(), "twodice", ["multiply"])
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    main()

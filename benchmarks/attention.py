"""Attention with dropout, forward and backward, against SDPA and the eager attention of transformers.

Two numbers bound it. Operations: a pair of query and key takes 2 products of K forward and 5 backward, 14 K
operations in all; with 8 x 6 heads of T = 512, K = 64, causal, 5.7 * 10^9, of which blocks of 32 queries
make 6.0 * 10^9. Beside them the softmax costs about 20 operations a pair and pass, the mask about 3. Bytes:
queries, keys, values, result and their four gradients, once each, 50 * 10^6: so the operations bind, at the
rate of torch's own product of matrices, which is printed. Scores live in scratch of 0.1 to 2 MiB a thread.

Run: python -m benchmarks.attention
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers.models.llama.modeling_llama import eager_attention_forward

from benchmarks.sidebyside import Row, alternate, table
from twodice.kernels import attention_blocks
from twodice.kernels.attention import attention as ours
from twodice.kernels.attention_passes import coordinates_of
from twodice.kernels.attention_reference import Rule

T10 = 6554  # the threshold of p = 0.1
LIMIT = 1.05
# B, H, T, K; the first two are the training steps of the issue.
SHAPES = (
    (8, 6, 512, 64),
    (4, 12, 256, 64),
    (16, 6, 64, 64),
    (8, 6, 128, 64),
    (4, 6, 1024, 64),
    (2, 6, 2048, 64),
    (1, 6, 4096, 64),
)
Given = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def given(
    B: int, H: int, N: int, T: int, S: int, K: int, W: int, dtype: torch.dtype = torch.float32
) -> Given:
    """Query, key and value as projections leave them, and the gradient from above."""
    shapes = ((B, T, H, K), (B, S, N, K), (B, S, N, W), (B, T, H, W))
    q, k, v, up = (torch.randn(shape).to(dtype).transpose(1, 2) for shape in shapes)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), up


def both(function: Callable[..., torch.Tensor]) -> Callable[[Given], Any]:
    """Forward and backward."""

    def call(x: Given) -> Any:
        q, k, v, up = x
        return torch.autograd.grad(function(q, k, v), (q, k, v), up)

    return call


def eager(mask: torch.Tensor, p: float) -> Callable[..., torch.Tensor]:
    """The function of transformers, which makes all weights."""

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=True)
        found = eager_attention_forward(module, q, k, v, mask, scaling=q.shape[-1] ** -0.5, dropout=p)
        return found[0].transpose(1, 2)

    return call


def causal_mask(T: int) -> torch.Tensor:
    """Minus infinity beyond the diagonal, (1, 1, T, T)."""
    return torch.full((T, T), float("-inf")).triu(1)[None, None]


def by_length(dtype: torch.dtype) -> list[Row]:
    """Causal, as in a training step, from short to long."""
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for B, H, T, K in SHAPES if dtype == torch.float32 else SHAPES[:1]:
            contenders = {
                "twodice": both(lambda q, k, v: ours(q, k, v, T10, 7, 3, causal=True)),
                "twodice p=0": both(lambda q, k, v: ours(q, k, v, 0, 7, 3, causal=True)),
                "sdpa p=0": both(lambda q, k, v: sdpa(q, k, v, is_causal=True)),
            }
            if T <= 1024 and dtype == torch.float32:
                contenders["sdpa p=0.1"] = both(lambda q, k, v: sdpa(q, k, v, is_causal=True, dropout_p=0.1))
                contenders["eager p=0.1"] = both(eager(causal_mask(T), 0.1))
            inputs = [given(B, H, H, T, T, K, K, dtype) for _ in range(2)]
            name = f"{str(dtype)[6:]} {B} x {H}, T = {T}, K = {K}"
            rows.append(Row(name, alternate(contenders, inputs, rounds=9, seconds=0.05), threads))
    return rows


def by_kind() -> list[Row]:
    """What a model may ask for, T = 512; the peer where `scaled_dot_product_attention` has it, at p = 0."""
    B, H, T, K = 4, 6, 512, 64
    seen = torch.ones(B, 1, 1, T, dtype=torch.bool)
    seen[1:, ..., T - 100 :] = False
    place = torch.arange(T)
    near = (place[:, None] >= place) & (place[:, None] - place < 128)
    bias, both_masks = torch.randn(1, H, T, T), seen & (place[:, None] >= place)
    plain = given(B, H, H, T, T, K, K)
    kinds: list[tuple[str, Given, dict[str, Any], dict[str, Any] | None]] = [
        ("causal", plain, {"causal": True}, {"is_causal": True}),
        ("all keys", plain, {}, {}),
        ("padded, causal", plain, {"bias": seen, "causal": True}, {"attn_mask": both_masks}),
        ("6 query heads for 2 key heads", given(B, H, 2, T, T, K, K), {"causal": True},
         {"is_causal": True, "enable_gqa": True}),
        ("window of 128", plain, {"causal": True, "window": 128}, {"attn_mask": near}),
        ("soft-capping", plain, {"causal": True, "softcap": 50.0}, None),
        ("sinks", plain, {"causal": True, "sinks": torch.zeros(H)}, None),
        ("additive bias", plain, {"bias": bias}, {"attn_mask": bias}),
        ("values half as wide", given(B, H, H, T, T, K, K // 2), {"causal": True}, {"is_causal": True}),
        ("cross-attention, 512 to 128 keys", given(B, H, H, T, 128, K, K), {}, {}),
        ("DropKey", plain, {"causal": True, "drop_keys": T10, "keys_key": 8}, None),
    ]  # fmt: skip
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for name, x, options, peer in kinds:
            contenders = {"twodice": both(lambda q, k, v, o=options: ours(q, k, v, T10, 7, 3, **o))}
            if peer is not None:
                contenders["sdpa p=0"] = both(lambda q, k, v, o=peer: sdpa(q, k, v, **o))
            rows.append(Row(name, alternate(contenders, [x], rounds=7, seconds=0.05), threads))
    return rows


def memory() -> None:
    """Print the bytes that each keeps for the backward pass, beyond its inputs, and our scratch."""
    B, H, T, K = SHAPES[0]
    q, k, v, _ = given(B, H, H, T, T, K, K)
    contenders = {
        "twodice p=0.1": lambda: ours(q, k, v, T10, 7, 3, causal=True),
        "sdpa p=0": lambda: sdpa(q, k, v, is_causal=True),
        "sdpa p=0.1": lambda: sdpa(q, k, v, is_causal=True, dropout_p=0.1),
        "eager p=0.1": lambda: eager(causal_mask(T), 0.1)(q, k, v),
    }
    print(f"\nkept for the backward pass beyond the inputs, {B} x {H}, T = {T}, K = {K}, float32")
    for name, call in contenders.items():
        kept: dict[int, int] = {}

        def keep(x: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            call()
        for x in (q, k, v):
            kept.pop(x.untyped_storage().data_ptr(), None)
        print(f"{name:<16}{sum(kept.values()) / 2**20:>10.2f} MiB")
    where = coordinates_of(q, T, None, None, None)
    rule = Rule(K**-0.5, True, 0, 0.0, T10, 7, 0, 0)
    call = attention_blocks.Call(
        attention_blocks.Inputs(q, k, v, None, None, torch.zeros(1, dtype=torch.int64), where, rule),
        torch.empty(B, H, T),
        None,
    )
    print(f"scratch of the backward pass: {call.native.scratch() / 2**20:.2f} MiB for each thread")


def products() -> None:
    """Print the rate of torch's product of matrices, which bounds all of them."""
    for threads in (1, 2):
        torch.set_num_threads(threads)
        a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
        times = []
        for _ in range(20):
            start = time.perf_counter()
            torch.mm(a, b)
            times.append(time.perf_counter() - start)
        rate = 2 * 1024**3 / min(times) / 1e9
        print(f"torch.mm, {threads} threads: {rate:.0f} * 10^9 operations a second; the bound for T = 512 is "
              f"{6.0e3 / rate:.1f} ms")  # fmt: skip


def main() -> None:
    """Print the tables."""
    before = torch.get_num_threads()
    try:
        products()
        rows = by_length(torch.float32) + by_length(torch.bfloat16)
        peers = ["twodice p=0", "sdpa p=0", "sdpa p=0.1", "eager p=0.1"]
        table("attention with dropout 0.1, causal, forward + backward", rows, "twodice", peers)
        for row in rows:
            if "T = 512" in row.name:
                share = row.seconds["twodice"] / row.seconds["sdpa p=0"]
                print(
                    f"{row.name}, {row.threads} threads: {share:.2f} x sdpa at p = 0; the limit is {LIMIT} x"
                )
        table("kinds of attention, 4 x 6, T = 512, K = 64", by_kind(), "twodice", ["sdpa p=0"])
        memory()
    finally:
        torch.set_num_threads(before)


if __name__ == "__main__":
    main()

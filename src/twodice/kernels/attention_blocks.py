"""Attention on the CPU in blocks: products of matrices in torch, all between them in one native pass.

A block is some query rows of some heads; its scores against all keys that they may see lie in scratch, which
stays in the cache and is used again for the next block. Forward: scores, weights in their place, product with
the values. Backward: the same scores, the gradient of the weights, then both turned in place into weights
with dropout and gradient of scores, and three products. All in float32: other types are converted block by
block. This module knows no autograd.

Letters: B rows, H query heads, N key heads, G = H / N, T queries, S keys, K key width, W value width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from twodice.kernels import dispatch, team
from twodice.kernels.attention_reference import Rule
from twodice.kernels.dropout_layout import Coordinates
from twodice.random.draws import ONE

#: Query rows of a block (half of them with few keys, as less of a causal block then lies beyond the diagonal)
#: and elements of a block of scores: small enough for the caches, large enough for few calls.
ROWS = 128
ELEMENTS = 1 << 19


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a call is given, of one dtype on the CPU; see `kernels.attention.attention`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None
    sinks: torch.Tensor | None
    steps: torch.Tensor
    where: Coordinates
    rule: Rule


def _floats(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.detach().to(torch.float32).contiguous()


def _address(x: torch.Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _step(x: torch.Tensor, axis: int) -> int:
    """The stride along an axis, 0 where one value serves for all."""
    return x.stride(axis) if x.shape[axis] > 1 else 0


class _Pass:
    """The native half of a call, what keeps its addresses alive, and the scratch."""

    def __init__(self, given: Inputs, lse: torch.Tensor, delta: torch.Tensor | None, threads: int) -> None:
        B, H, T, _ = given.query.shape
        S, rule, where = given.key.shape[2], given.rule, given.where
        self.H = H
        self.blocks = list(_blocks(T, S, rule))
        bias = given.bias
        if bias is not None:
            bias = bias.detach().to(torch.bool if bias.dtype == torch.bool else torch.float32)
            bias = bias.reshape((1,) * (4 - bias.dim()) + tuple(bias.shape))
            bias = bias.expand(*bias.shape[:3], S)
            bias = bias if S == 1 or bias.stride(3) == 1 else bias.contiguous()
        example, position = where.example.to(torch.int64), where.position.to(torch.int64)
        column = None if where.column is None else where.column.to(torch.int64)
        steps, sinks = given.steps.expand(B).contiguous(), _floats(given.sinks)
        self.alive = bias, sinks, lse, delta, example, position, column, steps
        self.native = dispatch.native.Attention(
            (B, H, T, S),
            rule.scale,
            rule.softcap,
            rule.causal,
            rule.window,
            _address(bias),
            bias is not None and bias.dtype == torch.bool,
            (0, 0, 0) if bias is None else tuple(_step(bias, axis) for axis in range(3)),
            _address(sinks),
            lse.data_ptr(),
            _address(delta),
            example.data_ptr(),
            (_step(example, 0), _step(example, 2)),
            position.data_ptr(),
            (_step(position, 0), _step(position, 2)),
            _address(column),
            (0, 0) if column is None else (_step(column, 0), _step(column, 3)),
            steps.data_ptr(),
            rule.key,
            rule.threshold,
            rule.keys_key,
            # With every key dropped each row keeps all; 65536 does not fit the kernel's 16 bits.
            0 if rule.drop_keys == ONE else rule.drop_keys,
            torch.get_num_threads() if threads == 1 else 1,
        )

    def floats(self, x: torch.Tensor) -> torch.Tensor:
        """Keys or values in float32, and without gaps where enough blocks read them again."""
        return x.float() if len(self.blocks) <= 2 else x.float().contiguous()


def _rows(T: int, S: int) -> int:
    """How many query rows a block has."""
    return min(T, ROWS if S > 2 * ROWS else max(1, ROWS // 2))


def _blocks(T: int, S: int, rule: Rule) -> Iterator[tuple[slice, slice]]:
    """Yield (query rows, keys that any of them may see)."""
    rows = _rows(T, S)
    for first in range(0, T, rows):
        last = min(T, first + rows)
        low, high = 0, min(S, last) if rule.causal else S
        if rule.window:
            low = min(S, max(0, first - rule.window + 1) // 64 * 64)
            high = max(low, min(high, last + rule.window - 1))
        yield slice(first, last), slice(low, high)


@dataclass(frozen=True, slots=True)
class _Heads:
    """Some heads that are worked on together: entry i is (b, h) = divmod(first + i * step, H)."""

    first: int
    step: int
    tensors: list[torch.Tensor]  # (heads, T, .)


def _parts(
    by_query: Sequence[torch.Tensor], by_key: Sequence[torch.Tensor], rule: Rule, apart: bool
) -> list[tuple[list[torch.Tensor], list[_Heads]]]:
    """Return tensors of some key heads, (heads, S, .), and with each the query heads that read them.

    Rows of the batch are worked on together where memory allows one axis for row and head, unless `apart`.
    """
    (B, H, T), (N, S) = by_query[0].shape[:3], by_key[0].shape[1:3]
    G = H // N
    joined = [_joined(x) for x in (*by_key, *by_query)] if G == 1 and not apart else [None]
    if all(x is not None for x in joined):
        flat = [x for x in joined if x is not None]
        batches = [(flat[: len(by_key)], [_Heads(0, 1, flat[len(by_key) :])])]
    else:
        batches = [
            ([x[b] for x in by_key], [_Heads(b * H + g, G, [x[b, g::G] for x in by_query]) for g in range(G)])
            for b in range(B)
        ]
    rows = _rows(T, S)
    width = min(S, rule.window * (1 if rule.causal else 2) + rows + 64) if rule.window else S
    most = max(1, ELEMENTS // (rows * max(width, 1)))
    # Enough parts for all threads.
    most = min(most, max(1, B * N // torch.get_num_threads()))
    found = []
    for keys, heads in batches:
        count = keys[0].shape[0]
        some = -(-count // -(-count // most))  # parts alike in size
        for low in range(0, count, some):
            cut = slice(low, low + some)
            readers = [_Heads(h.first + low * h.step, h.step, [x[cut] for x in h.tensors]) for h in heads]
            found.append(([x[cut] for x in keys], readers))
    return found


def _joined(x: torch.Tensor) -> torch.Tensor | None:
    """Row and head as one axis, where the strides allow it."""
    try:
        return x.view(-1, *x.shape[2:])
    except RuntimeError:
        return None


class _Scratch:
    """Memory that is used again for each block."""

    def __init__(self) -> None:
        self.kept: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, *shape: int) -> torch.Tensor:
        size = shape[0] * shape[1] * shape[2]
        held = self.kept.get(name)
        if held is None or held.numel() < size:
            held = self.kept[name] = torch.empty(size)
        return held[:size].view(shape)


def forward(given: Inputs, out: torch.Tensor) -> torch.Tensor:
    """Write the result into `out` and return the log of the sum of exponentials of each row, (B, H, T)."""
    lse = torch.empty(given.query.shape[:3])
    parts = _parts([given.query, out], [given.key, given.value], given.rule, False)
    threads = team.size(len(parts))
    work = _Pass(given, lse, None, threads)
    W = out.shape[3]

    def some(numbers: Iterator[int]) -> None:
        scratch = _Scratch()
        for number in numbers:
            (k, v), readers = parts[number]
            k, v, n = work.floats(k), work.floats(v), k.shape[0]
            for heads in readers:
                q, o = heads.tensors
                for rows, keys in work.blocks:
                    height, width = rows.stop - rows.start, keys.stop - keys.start
                    s = scratch("scores", n, height, width)
                    torch.bmm(q[:, rows].float(), k[:, keys].transpose(1, 2), out=s)
                    at = heads.first, heads.step, rows.start, keys.start
                    work.native.forward(s.data_ptr(), (n, height, width), at)
                    o[:, rows].copy_(torch.bmm(s, v[:, keys], out=scratch("product", n, height, W)))

    with torch.autocast("cpu", enabled=False):
        team.run(some, len(parts), threads)
    return lse


def backward(
    given: Inputs, grad: torch.Tensor, out: torch.Tensor, lse: torch.Tensor, of_bias: bool, of_sinks: bool
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of query, key, value, bias (not at a scale of 0) and sinks."""
    query, key, value, bias = given.query, given.key, given.value, given.bias
    delta = torch.empty_like(lse)
    for_query, for_key, for_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    for_bias = None
    if of_bias and bias is not None:
        for_bias = torch.zeros((1,) * (4 - bias.dim()) + tuple(bias.shape))
    by_query, by_key = [query, grad, out, for_query], [key, value, for_key, for_value]
    parts = _parts(by_query, by_key, given.rule, for_bias is not None)
    # Parts share the bias, and a sum must not depend on who comes first.
    threads = 1 if for_bias is not None else team.size(len(parts))
    work = _Pass(given, lse, delta, threads)

    def some(numbers: Iterator[int]) -> None:
        scratch = _Scratch()
        for number in numbers:
            _backward_part(work, scratch, *parts[number], for_bias)

    with torch.autocast("cpu", enabled=False):
        team.run(some, len(parts), threads)
    for_sinks = None
    if of_sinks and given.sinks is not None:
        # The sink's share of a row's mass; no value stands behind it, so its gradient is minus delta's part.
        share = torch.exp(given.sinks.detach().float()[None, :, None] - lse)
        for_sinks = -(share * delta).sum(dim=(0, 2)).to(given.sinks.dtype)
    if for_bias is not None and bias is not None:
        for_bias = for_bias.div_(given.rule.scale).reshape(bias.shape).to(bias.dtype)
    return for_query, for_key, for_value, for_bias, for_sinks


def _backward_part(
    work: _Pass,
    scratch: _Scratch,
    by_key: list[torch.Tensor],
    readers: list[_Heads],
    for_bias: torch.Tensor | None,
) -> None:
    """Write the gradients of some key heads and of the query heads that read them."""
    k, v, to_k, to_v = by_key
    k, v = work.floats(k), work.floats(v)
    n, S, K = k.shape
    W = v.shape[2]
    sum_k, sum_v, fresh = scratch("keys", n, S, K), scratch("values", n, S, W), True
    for heads in readers:
        q, up, o, to_q = heads.tensors
        # From the last rows on, so that the first block of a causal pass has all keys.
        for rows, keys in reversed(work.blocks):
            height, width = rows.stop - rows.start, keys.stop - keys.start
            s, g = scratch("scores", n, height, width), scratch("grads", n, height, width)
            q_rows, up_rows, o_rows = q[:, rows].float(), up[:, rows].float(), o[:, rows].float()
            if up_rows.stride(2) != 1:
                up_rows = up_rows.contiguous()
            torch.bmm(q_rows, k[:, keys].transpose(1, 2), out=s)
            torch.bmm(up_rows, v[:, keys].transpose(1, 2), out=g)
            work.native.backward(
                s.data_ptr(),
                g.data_ptr(),
                (n, height, width),
                (heads.first, heads.step, rows.start, keys.start),
                up_rows.data_ptr(),
                up_rows.stride()[:2],
                o_rows.data_ptr(),
                o_rows.stride()[:2],
                W,
            )
            if for_bias is not None:
                _add_bias(for_bias, g, heads, work.H, rows, keys)
            to_q[:, rows].copy_(torch.bmm(g, k[:, keys], out=scratch("product", n, height, K)))
            if fresh and width == S:
                torch.bmm(s.transpose(1, 2), up_rows, out=sum_v)
                torch.bmm(g.transpose(1, 2), q_rows, out=sum_k)
            else:
                if fresh:
                    sum_k.zero_()
                    sum_v.zero_()
                sum_v[:, keys].baddbmm_(s.transpose(1, 2), up_rows)
                sum_k[:, keys].baddbmm_(g.transpose(1, 2), q_rows)
            fresh = False
    to_k.copy_(sum_k)
    to_v.copy_(sum_v)


def _add_bias(
    for_bias: torch.Tensor, grads: torch.Tensor, heads: _Heads, H: int, rows: slice, keys: slice
) -> None:
    """Add the gradient of a block of logits, of one row of the batch, summed where the bias has one value."""
    b, h = divmod(heads.first, H)
    of_heads = slice(h, h + (grads.shape[0] - 1) * heads.step + 1, heads.step)
    into = for_bias[b if for_bias.shape[0] > 1 else 0]
    for axis in range(3):
        if into.shape[axis] == 1:
            grads = grads.sum(dim=axis, keepdim=True)
    into[
        tuple(
            part if into.shape[axis] > 1 else slice(0, 1) for axis, part in enumerate((of_heads, rows, keys))
        )
    ] += grads

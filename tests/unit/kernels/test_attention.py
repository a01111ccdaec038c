"""Attention in blocks gives what its readable twin gives in float64: values and gradients, and exactly the
masks of dropout.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from twodice.errors import ConfigError, ShapeError
from twodice.kernels import attention_blocks as blocks
from twodice.kernels import dispatch
from twodice.kernels.attention import attention
from twodice.kernels.attention_passes import coordinates_of
from twodice.kernels.attention_reference import Rule, attention_reference, gradients_reference
from twodice.kernels.dropout import dropout
from twodice.random.keys import Key

native = dispatch.native
LEVELS = native.simd_levels() if native is not None else []
needs_native = pytest.mark.skipif(native is None, reason="no native module")
T, KEY, STEP = 20000, 2**63 + 7, 17


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    level, threads = native.simd() if native else None, torch.get_num_threads()
    yield
    if native:
        native.set_simd(level)
    torch.set_num_threads(threads)


def values(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(B: int, H: int, N: int, T: int, S: int, K: int, W: int) -> list[torch.Tensor]:
    """Query, key and value, the query's memory as a projection leaves it."""
    return [values(B, T, H, K).transpose(1, 2), values(B, N, S, K, seed=1), values(B, N, S, W, seed=2)]


def passes(
    tensors: list[torch.Tensor], extra: dict[str, torch.Tensor], threshold: int, **options: Any
) -> list[torch.Tensor]:
    """The result and the gradients of everything."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    more = {name: x.detach().requires_grad_() for name, x in extra.items()}
    y = attention(leaves[0], leaves[1], leaves[2], threshold, KEY, STEP, **more, **options)
    up = values(*y.shape, seed=9).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves + list(more.values()), up)]


def twin(tensors: list[torch.Tensor], extra: dict[str, torch.Tensor], threshold: int, **options: Any) -> Any:
    """The same in float64, which the readable twin serves."""
    wide = {name: x.double() for name, x in extra.items()}
    if (bias := options.get("bias")) is not None and bias.dtype != torch.bool:
        options["bias"] = bias.double()
    return passes([x.double() for x in tensors], wide, threshold, **options)


def padding(B: int, S: int) -> torch.Tensor:
    """True where a key is seen: the last third is hidden in the first row, the first third in the second."""
    seen = torch.ones(B, 1, 1, S, dtype=torch.bool)
    seen[0, ..., S - S // 3 :] = False
    seen[1, ..., : S // 3] = False
    return seen


# B, H, N, T, S, K, W; tensors that get a gradient; options.
CASES: dict[str, tuple[tuple[int, ...], dict[str, torch.Tensor], dict[str, Any]]] = {
    "plain": ((2, 3, 3, 40, 40, 8, 8), {}, {}),
    "causal": ((2, 3, 3, 150, 150, 8, 8), {}, {"causal": True}),
    "one token": ((1, 1, 1, 1, 1, 1, 1), {}, {"causal": True}),
    "odd sizes": ((3, 2, 2, 131, 131, 7, 7), {}, {"causal": True, "scale": 0.3}),
    "negative scale": ((1, 2, 2, 19, 19, 4, 4), {}, {"scale": -0.3}),
    "fewer keys": ((2, 2, 2, 150, 21, 8, 8), {}, {"causal": True}),
    "cross-attention": ((2, 2, 2, 21, 150, 8, 8), {}, {}),
    "grouped queries, other value width": ((2, 6, 2, 130, 130, 8, 5), {}, {"causal": True}),
    "window": ((1, 2, 1, 200, 200, 8, 8), {}, {"causal": True, "window": 30}),
    "window on both sides": ((1, 2, 2, 200, 150, 8, 8), {}, {"window": 20}),
    "softcap": ((2, 2, 2, 33, 33, 8, 8), {}, {"softcap": 1.5, "causal": True}),
    "padding": ((2, 3, 3, 50, 50, 8, 8), {}, {"bias": padding(2, 50), "causal": True}),
    "padding under a softcap": ((2, 2, 1, 50, 50, 8, 8), {}, {"bias": padding(2, 50), "softcap": 2.0}),
    "position bias": ((2, 4, 4, 40, 40, 8, 8), {"bias": values(1, 4, 40, 40, seed=3)}, {}),
    "bias of rows": ((2, 4, 2, 140, 20, 8, 8), {"bias": values(2, 1, 140, 1, seed=3)}, {"causal": True}),
    "bias of keys, window": ((2, 4, 2, 190, 190, 8, 8), {"bias": values(190, seed=3)}, {"window": 9}),
    "bias under a softcap": ((1, 2, 2, 9, 9, 4, 4), {"bias": values(9, 9, seed=3)}, {"softcap": 2.0}),
    "sinks": ((2, 4, 2, 50, 50, 8, 8), {"sinks": values(4, seed=3)}, {"causal": True, "window": 11}),
    "DropKey": ((2, 2, 2, 140, 140, 8, 8), {}, {"causal": True, "drop_keys": 30000, "keys_key": 5}),
    "every key": ((2, 2, 2, 9, 5, 8, 8), {}, {"drop_keys": 60000, "keys_key": Key(5)}),
    "packed": (
        (2, 2, 2, 30, 30, 8, 8),
        {},
        {
            "causal": True,
            "examples": torch.tensor([2**32 - 1, 3]),
            "positions": torch.arange(30).remainder(13)[None] + 2**31,
            "key_positions": torch.stack([torch.arange(30) % 13, torch.arange(30) * 7 % 31 + 2**22]),
        },
    ),
    "cached keys": ((2, 2, 2, 70, 70, 8, 8), {}, {"key_positions": torch.arange(70)[None] + 1003}),
}


@needs_native
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", CASES)
def test_blocks_give_what_the_twin_gives(name: str, level: str) -> None:
    native.set_simd(level)
    shape, extra, options = CASES[name]
    tensors = inputs(*shape)
    for ours, wide in zip(
        passes(tensors, extra, T, **options), twin(tensors, extra, T, **options), strict=True
    ):
        assert ours.dtype == torch.float32
        # Sums of a few hundred float32 terms of size 1 to 10.
        torch.testing.assert_close(ours.double(), wide, atol=2e-5, rtol=2e-5)


@needs_native
@pytest.mark.parametrize("name", ["causal", "grouped queries, other value width", "position bias", "packed"])
def test_float32_twin_and_missing_module_give_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, extra, options = CASES[name]
    ours = passes(inputs(*shape), extra, T, **options)
    monkeypatch.setattr(dispatch, "native", None)
    monkeypatch.setattr(dispatch, "say_once_when_slow", lambda: None)
    for found, reference in zip(ours, passes(inputs(*shape), extra, T, **options), strict=True):
        torch.testing.assert_close(found, reference, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["causal", "grouped queries, other value width", "position bias"])
def test_half_types_are_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    shape, extra, options = CASES[name]
    tensors = [x.to(dtype) for x in inputs(*shape)]
    extra = {key: x.to(dtype) for key, x in extra.items()}
    for ours, wide in zip(
        passes(tensors, extra, T, **options), twin(tensors, extra, T, **options), strict=True
    ):
        assert ours.dtype == dtype
        # Only what goes in and comes out is rounded, to 8 or 11 bits.
        error = float((ours.double() - wide).abs().max() / wide.abs().max())
        assert error < (1e-2 if dtype == torch.bfloat16 else 2e-3)


@pytest.mark.parametrize("name", CASES)
def test_the_twins_gradients_are_those_of_its_result(name: str) -> None:
    shape, extra, options = CASES[name]
    q, k, v = (x.double().requires_grad_() for x in inputs(*shape))
    more = {key: x.double().requires_grad_() for key, x in extra.items()}
    bias = more.get("bias", options.get("bias"))
    numbers = {key: options.get(key) for key in ("examples", "positions", "key_positions")}
    where, step = coordinates_of(q, k.shape[2], **numbers), torch.tensor([STEP])
    rule = Rule(
        options.get("scale", 0.3), options.get("causal", False), options.get("window", 0),
        options.get("softcap", 0.0), T, KEY, options.get("drop_keys", 0), 5,
    )  # fmt: skip
    given = q, k, v, bias, more.get("sinks"), step, where, rule
    y, _ = attention_reference(*given)
    up = values(*y.shape, seed=9).double()
    found = gradients_reference(up, *given, "bias" in more, "sinks" in more)
    expected = torch.autograd.grad(y, [q, k, v, *more.values()], up)
    for ours, plain in zip([x for x in found if x is not None], expected, strict=True):
        torch.testing.assert_close(ours.detach(), plain)


def mask_of(B: int, H: int, n: int, threshold: int, **options: Any) -> torch.Tensor:
    """The mask (B, H, n, n) read back: equal weights, and values that name the keys."""
    query, key = torch.zeros(B, n, H, 4).transpose(1, 2), torch.zeros(B, H, n, 4)
    eye = torch.eye(n).expand(B, H, n, n)
    return attention(query, key, eye, threshold, KEY, STEP, **options) != 0


COORDINATES: list[dict[str, torch.Tensor]] = [
    {},
    {"examples": torch.tensor([5, 2**32 - 1]), "positions": torch.arange(97)[None] + 11},
    {"examples": torch.arange(2 * 97).reshape(2, 97) * 7},
    {"key_positions": torch.arange(97)[None] + 1003},
    {"key_positions": torch.stack([(torch.arange(97) - 20).clamp(min=0), torch.arange(97) * 31 % 101])},
]


@pytest.mark.parametrize("options", COORDINATES, ids=["none", "given", "packed", "shifted", "padded"])
@pytest.mark.parametrize("level", LEVELS or ["reference"])
def test_masks_are_those_of_dropout(level: str, options: dict[str, torch.Tensor]) -> None:
    if native is not None:
        native.set_simd(level)
    ones = torch.ones(2, 3, 97, 97)
    for threshold in (0, 1, T, 65535, 65536):
        plain = dropout(ones, threshold, KEY, STEP, layout="bhts", **options) != 0
        assert torch.equal(mask_of(2, 3, 97, threshold, **options), plain)
    assert torch.equal(
        mask_of(2, 3, 97, T, causal=True, **options),
        (dropout(ones, T, KEY, STEP, layout="bhts", **options) != 0).tril(),
    )


@needs_native
def test_masks_do_not_depend_on_blocks_or_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = mask_of(2, 3, 130, T)
    tensors, expected_passes = inputs(2, 4, 2, 130, 130, 8, 8), None
    for rows, elements, threads in ((128, 1 << 18, 1), (16, 1, 2), (50, 5000, 3), (1000, 1 << 20, 2)):
        monkeypatch.setattr(blocks, "ROWS", rows)
        monkeypatch.setattr(blocks, "ELEMENTS", elements)
        torch.set_num_threads(threads)
        assert torch.equal(mask_of(2, 3, 130, T), expected)
        found = passes(tensors, {}, T, causal=True)
        expected_passes = expected_passes or found
        for ours, first in zip(found, expected_passes, strict=True):
            torch.testing.assert_close(ours, first, atol=1e-5, rtol=1e-5)


def test_a_step_for_each_row_is_that_step() -> None:
    tensors = inputs(2, 2, 2, 9, 9, 4, 4)
    both = attention(*tensors, T, KEY, torch.tensor([3, 8]))
    for b, step in enumerate((3, 8)):
        assert torch.equal(both[b], attention(*tensors, T, KEY, step)[b])


def test_no_dropout_is_attention_as_torch_has_it() -> None:
    tensors = inputs(2, 4, 2, 70, 70, 8, 8)
    ours = attention(*tensors, 0, KEY, STEP, causal=True)
    peer = torch.nn.functional.scaled_dot_product_attention(*tensors, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(ours, peer, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_rate_one_gives_zero_and_zero_gradients(wide: bool) -> None:
    tensors = [x.double() if wide else x for x in inputs(2, 2, 2, 9, 9, 4, 4)]
    extra = {"bias": values(9, 9).to(tensors[0].dtype), "sinks": values(2).to(tensors[0].dtype)}
    assert all(not x.any() for x in passes(tensors, extra, 65536))


@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_a_row_that_sees_no_key_gives_zero_and_no_gradient(wide: bool) -> None:
    tensors = [x.double() if wide else x for x in inputs(2, 2, 2, 20, 20, 4, 4)]
    hidden = torch.ones(2, 1, 20, 20, dtype=torch.bool)
    hidden[0, 0, 3] = False
    added = torch.zeros(2, 1, 20, 20).masked_fill(~hidden, float("-inf"))
    for bias in (hidden, added):
        y, *grads = passes(tensors, {}, T, bias=bias)
        assert not y[0, :, 3].any() and y[0, :, 4].any() and not grads[0][0, :, 3].any()
        assert all(x.isfinite().all() for x in (y, *grads))


def test_not_a_number_and_infinity_stay_in_their_rows() -> None:
    query, key, value = inputs(1, 1, 1, 40, 40, 4, 4)
    query = query.clone()
    query[0, 0, 5, 2] = float("nan")
    y = attention(query, key, value, T, KEY, STEP)
    assert y[0, 0, 5].isnan().all() and y[0, 0, :5].isfinite().all() and y[0, 0, 6:].isfinite().all()


def test_gradcheck_at_a_fixed_key() -> None:
    q, k, v = (x.double().requires_grad_() for x in inputs(1, 2, 1, 4, 5, 3, 2))
    bias, sinks = (x.double().requires_grad_() for x in (values(2, 4, 1), values(2, seed=1)))
    assert torch.autograd.gradcheck(
        lambda q, k, v, bias, sinks: attention(
            q, k, v, T, KEY, STEP, bias=bias, sinks=sinks, softcap=2.0, drop_keys=9000, keys_key=1
        ),
        (q, k, v, bias, sinks),
    )


def test_nothing_of_the_size_of_the_scores_is_kept() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(2, 3, 3, 300, 300, 8, 8))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        attention(q, k, v, T, KEY, STEP, causal=True)
    # Inputs and result, one number a row, and coordinates.
    assert sum(x.numel() for x in saved) <= 4 * q.numel() + 2 * 3 * 300 + 300 + 3


def test_the_memory_of_the_result_joins_heads_without_a_copy() -> None:
    y = attention(*inputs(2, 3, 3, 7, 7, 4, 5), T, KEY, STEP)
    assert y.transpose(1, 2).is_contiguous()


def test_any_stride_serves() -> None:
    q, k, v = inputs(2, 2, 2, 20, 20, 8, 8)
    plain = passes([q, k, v], {}, T)
    odd = [
        q.transpose(2, 3).contiguous().transpose(2, 3),
        k.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
        v.repeat_interleave(2, dim=3)[..., ::2],
    ]
    for ours, first in zip(passes(odd, {}, T), plain, strict=True):
        torch.testing.assert_close(ours, first, atol=1e-5, rtol=1e-5)
    one = k[:, :1].expand(2, 2, 20, 8)
    torch.testing.assert_close(
        attention(q, one, v, T, KEY, STEP), attention(q, one.contiguous(), v, T, KEY, STEP)
    )


def test_compiled_code_gives_what_eager_code_gives_in_one_graph() -> None:
    torch._dynamo.reset()
    graphs = 0

    def counting(module: torch.fx.GraphModule, given: list[torch.Tensor]) -> object:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(module, given)

    def layer(q: Any, k: Any, v: Any, bias: Any, sinks: Any, t: Any, step: Any) -> torch.Tensor:
        more = {"bias": bias, "sinks": sinks, "drop_keys": t, "keys_key": 4, "causal": True}
        return attention(q * 1.0, k, v, t, Key(KEY), step, **more)

    run = torch.compile(layer, backend=counting, fullgraph=True)
    for number in range(5):
        leaves = [x.requires_grad_() for x in (*inputs(2, 4, 2, 9, 9, 8, 5), values(2, 1, 9, 9), values(4))]
        rest = torch.tensor(9000 * number), torch.tensor(number)
        ours, plain = run(*leaves, *rest), layer(*leaves, *rest)
        assert ours.stride() == plain.stride()
        # The same masks; a matrix product may sum in another order where its operands lie at other addresses.
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)
        up = values(*ours.shape, seed=5)
        for a, b in zip(
            torch.autograd.grad(ours, leaves, up), torch.autograd.grad(plain, leaves, up), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert graphs == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"query": torch.ones(2, 3, 4)}, "attention needs"),
        ({"key": torch.ones(2, 2, 5, 3)}, "attention needs"),
        ({"key": torch.ones(2, 3, 5, 4), "value": torch.ones(2, 3, 5, 4)}, "must divide"),
        ({"value": torch.ones(2, 2, 5, 4).double()}, "dtype and device"),
        ({"bias": torch.ones(2, 5)}, "bias must be broadcastable"),
        ({"bias": torch.ones(5, dtype=torch.int64)}, "boolean or floating"),
        ({"sinks": torch.ones(2)}, r"sinks must be \(H,\)"),
        ({"window": 0}, "window must be at least 1"),
        ({"softcap": 0.0}, "softcap must be positive"),
        ({"threshold": 65537}, "threshold must be in"),
        ({"drop_keys": 5}, "key of its own"),
        ({"step": -1}, "step must be in"),
        ({"step": torch.tensor([1, 2, 3])}, "one a row"),
        ({"examples": torch.arange(3)}, "examples must be"),
        ({"key_positions": torch.full((1, 5), 2**23)}, "column must be in"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "query": torch.ones(2, 4, 3, 4),
        "key": torch.ones(2, 2, 5, 4),
        "value": torch.ones(2, 2, 5, 4),
        "threshold": 5,
        "site_key": 7,
        "step": 3,
    }
    with pytest.raises((ShapeError, ConfigError), match=message):
        attention(**(given | change))


def test_nothing_is_fine() -> None:
    for B, T_, S in ((0, 3, 3), (2, 0, 3), (2, 3, 0)):
        tensors = inputs(B, 2, 2, T_, S, 4, 5)
        assert passes(tensors, {}, T)[0].shape == (B, 2, T_, 5)


def test_under_autocast_mixed_types_are_cast_as_torch_casts_them() -> None:
    torch.manual_seed(3)
    q, k = (torch.randn(1, 2, 5, 8, requires_grad=True) for _ in "qk")
    v = torch.randn(1, 2, 5, 8).bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = attention(q, k, v, 6554, 7, 3, causal=True)
        assert mixed.dtype == torch.nn.functional.scaled_dot_product_attention(q, k, v).dtype
    alike = attention(q.bfloat16(), k.bfloat16(), v, 6554, 7, 3, causal=True)
    assert mixed.dtype == torch.bfloat16 and torch.equal(mixed, alike)
    of_mixed, of_alike = (torch.autograd.grad(y.float().sum(), (q, k, v)) for y in (mixed, alike))
    assert [g.dtype for g in of_mixed] == [torch.float32, torch.float32, torch.bfloat16]
    assert all(torch.equal(a, b) for a, b in zip(of_mixed, of_alike, strict=True))
    with pytest.raises(ShapeError, match="dtype and device of query"):
        attention(q, k, v, 6554, 7, 3)

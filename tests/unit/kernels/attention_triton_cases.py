"""What attention in Triton must be: its readable twin, both ways. Run by ``test_attention_triton.py``.

By hand: TRITON_INTERPRET=1 python -m pytest tests/unit/kernels/attention_triton_cases.py. Without that
variable the cases run on the GPU. Tiles are small, so that each case takes several along both axes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.support.triton_kernels import DEVICE

from twodice.kernels import attention_passes, attention_triton
from twodice.kernels.attention import attention
from twodice.kernels.attention_passes import empty_result
from twodice.kernels.attention_reference import Rule, attention_reference
from twodice.kernels.dropout_layout import coordinates
from twodice.kernels.dropout_reference import kept

# The interpreter computes with numpy, which warns of exp(-inf) and its like.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
TILE = (16, 16)
WORD = 2**32 - 1
# Sums of some tens of terms near 1 in another order; bfloat16 has 8 bits and rounds the weights too.
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, ...]:
    result = empty_result(query, value)
    return result, attention_triton.forward(query, key, value, *rest, result, TILE)


class Case:
    """One set of inputs, and both results with their gradients."""

    def __init__(
        self, *, B=1, H=2, N=1, T=20, S=20, K=8, W=12, dtype=torch.float32, threshold=20000, causal=False,
        window=0, softcap=0.0, bias=None, sinks=False, examples=None, positions=None, key_positions=None,
        step=(5,),
    ) -> None:  # fmt: skip
        query = normal(B, T, H, K).transpose(1, 2)  # as models hold it
        tensors = [query, normal(B, S, N, K, seed=1).transpose(1, 2), normal(B, N, S, W, seed=2)]
        self.inputs = [x.to(dtype).requires_grad_() for x in tensors]
        if bias is not None and bias.dtype != torch.bool:
            bias = bias.detach().requires_grad_()
        self.bias, self.sinks = bias, normal(H, seed=3).requires_grad_() if sinks else None
        where = coordinates(normal(B, H, T, S), "bhts", examples, positions, key_positions)
        self.rest = (
            torch.tensor(step, device=DEVICE),
            where,
            Rule(K**-0.5, causal, window, softcap, threshold, 2**63 + 5, 0, 0),
        )
        self.up, self.dtype = normal(B, H, T, W, seed=4).to(dtype), dtype

    def check(self) -> None:
        """The result, the sums of exponentials and every gradient agree with the twin."""
        given = [*self.inputs, self.bias, self.sinks]
        result, lse = attention_reference(*given, *self.rest)
        leaves = [x for x in given if x is not None and x.requires_grad]
        grads = torch.autograd.grad(result, leaves, self.up)
        with torch.no_grad():
            ours, our_lse = forward(*given, *self.rest)
            back = attention_triton.backward(self.up, ours, our_lse, *given, *self.rest, block=TILE)
        assert torch.equal(lse.isinf(), our_lse.isinf())
        assert ours.dtype == self.dtype and ours.transpose(1, 2).is_contiguous()  # as the queries lie
        pairs = [(result, ours), (lse, our_lse), *zip(grads, (x for x in back if x is not None), strict=True)]
        for number, (theirs, mine) in enumerate(pairs):
            torch.testing.assert_close(
                mine.float(),
                theirs.float(),
                rtol=CLOSE[self.dtype],
                atol=CLOSE[self.dtype],
                msg=lambda m, n=number: f"{n}: {m}",
            )


def test_causal_with_grouped_queries() -> None:
    Case(B=2, H=4, N=2, T=17, S=17, causal=True).check()


def test_cross_attention_of_more_keys_than_queries() -> None:
    Case(T=5, S=35).check()
    Case(T=35, S=5, causal=True).check()


@pytest.mark.parametrize("causal", [True, False])
def test_a_sliding_window_and_a_softcap(causal: bool) -> None:
    Case(T=37, S=37, causal=causal, window=9, softcap=5.0, threshold=9000).check()


def test_no_dropout_and_all_dropped() -> None:
    Case(threshold=0, causal=True).check()
    case = Case(threshold=65536)
    case.check()
    assert not forward(*case.inputs, None, None, *case.rest)[0].any()


def test_a_bias_of_each_row_head_query_and_key_and_its_gradient() -> None:
    Case(B=2, bias=normal(2, 2, 20, 20, seed=5), softcap=3.0).check()


@pytest.mark.parametrize("shape", [(1, 2, 20, 20), (2, 1, 1, 20), (20, 20)])
def test_a_bias_that_rows_heads_or_queries_share_and_its_gradient(shape: tuple[int, ...]) -> None:
    Case(B=2, bias=normal(*shape, seed=5), causal=True).check()


def test_padding_hides_keys_and_a_query_that_sees_none_gives_zero() -> None:
    seen = torch.ones(2, 1, 20, 20, dtype=torch.bool, device=DEVICE)
    seen[0, :, :, 13:] = False
    seen[1, :, 7] = False
    case = Case(B=2, bias=seen)
    case.check()
    assert not forward(*case.inputs, seen, None, *case.rest)[0][1, :, 7].any()


def test_sinks_take_mass_and_have_a_gradient() -> None:
    Case(sinks=True, causal=True).check()


def test_given_coordinates_a_step_a_row_and_a_rate_on_the_device() -> None:
    at = torch.arange(20, device=DEVICE)
    Case(
        B=2, examples=torch.tensor([7, WORD], device=DEVICE), positions=at[None] + 2**31,
        key_positions=at[None] + 3,
        step=(1, WORD), threshold=torch.tensor(30000, device=DEVICE),
    ).check()  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    Case(dtype=dtype, causal=True).check()


def test_the_mask_is_bit_for_bit_that_of_dropout_on_the_weights() -> None:
    for columns in (None, torch.arange(40, device=DEVICE)[None] * 7919 % 2**23):
        case = Case(B=2, H=3, N=3, T=20, S=40, W=40, key_positions=columns)
        query, key, _ = case.inputs
        identity = torch.eye(40, device=DEVICE).expand(2, 3, 40, 40)
        weights, _ = forward(query, key, identity, None, None, *case.rest)
        step, where, rule = case.rest
        assert torch.equal(weights != 0, kept(rule.threshold, rule.key, step, where))


def test_what_is_not_served_is_said() -> None:
    query, value = torch.ones(1, 1, 2, 8), torch.ones(1, 1, 2, 8)
    plain = Rule(1.0, False, 0, 0.0, 0, 1, 0, 0)
    assert attention_triton.not_served(query, value, plain) is None
    assert attention_triton.not_served(query.double(), value, plain) == "float64"
    assert attention_triton.not_served(query, torch.ones(1, 1, 2, 300), plain) == "heads wider than 256"
    assert attention_triton.not_served(query, value, Rule(1.0, False, 0, 0.0, 0, 1, 9, 2)) == "DropKey"


def test_a_call_of_attention_reaches_the_kernels_and_their_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_passes, "_in_triton", lambda *_: True)
    monkeypatch.setattr(attention_passes, "_in_blocks", lambda *_: False)
    called: list[str] = []
    for name in ("forward", "backward"):
        kernel = getattr(attention_triton, name)
        monkeypatch.setattr(attention_triton, name, lambda *a, n=name, k=kernel: called.append(n) or k(*a))
    found = []
    for _ in range(2):
        inputs = Case(T=17, S=17).inputs
        result = attention(*inputs, 20000, 7, 3, causal=True)
        found.append((result, *torch.autograd.grad(result.sum(), inputs)))
        monkeypatch.setattr(attention_passes, "_in_triton", lambda *_: False)
    assert called == ["forward", "backward"]
    for ours, twin in zip(*found, strict=True):
        torch.testing.assert_close(ours, twin, rtol=2e-5, atol=2e-5)

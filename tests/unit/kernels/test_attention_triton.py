"""Attention in Triton: its readable twin to the order of sums, its masks to the bit; and that it compiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.support.triton_kernels import MODES, assembly, cases_pass, needs_triton

pytestmark = needs_triton


@pytest.mark.parametrize("mode", MODES)
def test_attention_in_triton_is_its_readable_twin(mode: str) -> None:
    cases_pass(Path(__file__).with_name("attention_triton_cases.py"), mode)


@pytest.mark.parametrize("name", ["forward_kernel", "query_kernel", "key_kernel", "bias_kernel"])
def test_every_kernel_compiles_for_a_gpu_and_uses_its_matrix_units(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from twodice.kernels import attention_triton_kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = getattr(attention_triton_kernels, name)
    halves = ("query", "key", "value", "result", "grad", "to_query", "to_key", "to_value", "bias", "sinks")
    given: dict[str, Any] = dict.fromkeys(kernel.arg_names, "i32+")
    given |= {at: "*bf16+" for at in halves} | {at: "*fp32+" for at in ("lse", "delta", "to_bias")}
    given |= {"examples": "*i64+", "positions": "*i64+", "step": "*i64+", "columns": None}
    given |= {"threshold": "i32", "threshold_at": "*i64", "k0": "i32", "k1": "i32", "window": "i32"}
    given |= {"scale": "fp32", "softcap": "fp32", "ROWS": 32, "KEYS": 32, "WIDE_K": 64, "WIDE_W": 64}
    given |= {
        "DROP": True,
        "CAUSAL": True,
        "WINDOW": True,
        "SOFTCAP": True,
        "BOOLEAN": False,
        "BY_BITS": False,
    }
    given = {at: value for at, value in given.items() if at in kernel.arg_names}
    text = assembly(kernel, given, capability=80, num_warps=4, num_stages=2, enable_fp_fusion=True)
    assert "mma.sync" in text and "mul.hi.u32" in text

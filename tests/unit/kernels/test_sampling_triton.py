"""Sampling in Triton: bit-equal with its readable twin, and what its compiler makes of it for a GPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tests.support.triton_kernels import MODES, assembly, cases_pass, needs_triton

pytestmark = needs_triton
CASES = Path(__file__).with_name("sampling_triton_cases.py")


@pytest.mark.parametrize("mode", MODES)
def test_sampling_in_triton_has_the_bits_of_its_readable_twin(mode: str) -> None:
    cases_pass(CASES, mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_ten_thousand_adversarial_rows_give_the_same_bits(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWODICE_TRITON_ROWS", "10000")
    cases_pass(CASES, mode)


def sampling_assembly(name: str, element: str, *, fused: bool = False) -> str:
    """One of the kernels for logits whose columns lie side by side."""
    from twodice.kernels import sampling_triton_kernels

    kernel = getattr(sampling_triton_kernels, name)
    given: dict[str, Any] = {"x": f"*{element}+", "row_stride": "i32+", "column_stride": 1, "V": "i32+"}
    given |= {at: "*i32+" for at in ("maxima", "tops", "pools", "lists", "states")}
    given |= {"plans": "*i64+", "bounds": "*fp32+", "masses": "*i64+", "tokens": "*i64+", "ranks": "*i64+"}
    given |= {"BLOCK": 256, "BLOCKS": 16, "TILE": 1024, "ROOM": 1024, "BY_BITS": False}
    given = {at: given[at] for at in kernel.arg_names}
    return assembly(kernel, given, num_warps=8, enable_fp_fusion=fused)


@pytest.mark.parametrize("name", ["survey_kernel", "weigh_kernel", "draw_kernel"])
def test_every_kernel_compiles_for_a_gpu_without_fused_operations(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    text = sampling_assembly(name, "bf16")
    assert "fma.rn.f64" not in text and not re.search(r"div\.approx|div\.full", text)
    if name == "survey_kernel":
        assert "ld.global.v4.b32" in text  # 8 logits at once
    else:
        assert "mul.rn.f64" in text and "div.rn.f64" in text and "mul.hi.u32" in text


def test_with_fusion_on_the_compiler_would_give_other_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert "fma.rn.f64" in sampling_assembly("weigh_kernel", "fp32", fused=True)

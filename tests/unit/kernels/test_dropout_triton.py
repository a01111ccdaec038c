"""Dropout in Triton: bit-equal with its readable twin, and what its compiler makes of it for a GPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from benchmarks import gpu
from tests.support.triton_kernels import MODES, assembly, cases_pass, needs_triton

pytestmark = needs_triton


@pytest.mark.parametrize("mode", MODES)
def test_dropout_in_triton_has_the_bits_of_its_readable_twin(mode: str) -> None:
    cases_pass(Path(__file__).with_name("dropout_triton_cases.py"), mode)


def dropout_assembly(element: str, *, fused: bool = False, capability: int = 90) -> str:
    """The kernel of dropout_add with rows of 512 columns in a row in memory."""
    from twodice.kernels.dropout_triton import _kernel

    given = dict.fromkeys(_kernel.arg_names, "i32+")
    given |= {"x": f"*{element}+", "residual": f"*{element}+", "y": f"*{element}+"}
    given |= {"examples": "*i64+", "positions": "*i64+", "columns": None}
    given |= {"threshold_at": "*i64", "step_at": None, "threshold": "i32", "k0": "i32", "k1": "i32"}
    given |= {"xc": 1, "rc": 1, "yc": 1, "ROWS": 4, "COLUMNS": 512, "BY_BITS": False, "LONG": False}
    return assembly(_kernel, given, capability, enable_fp_fusion=fused)


def test_what_is_compiled_for_a_gpu_rounds_the_product_before_the_sum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    single, half = dropout_assembly("fp32", capability=80), dropout_assembly("bf16")
    for text in (single, half):
        assert not re.search(r"\bfma\.|\.ftz|div\.full|div\.approx", text)
        assert "mul.rn.f32" in text and "mul.hi.u32" in text and "div.rn.f32" in text
    assert "cvt.rn.bf16" in half
    assert "mul.rn.f32" not in dropout_assembly("fp32", fused=True)  # there the two may become one


def test_what_is_compiled_for_a_gpu_moves_16_bytes_at_once_and_no_decision_between_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    text = dropout_assembly("bf16")
    assert "ld.global.v4.b32" in text and "st.global.v4.b32" in text and ".shared" not in text
    # 16 elements a thread: one Philox call for 8 of them is 20 high products each, less those of whole rows.
    assert 30 <= text.count("mul.hi.u32") <= 40


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: run python -m benchmarks.gpu")
def test_the_benchmark_says_in_one_line_that_there_is_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    gpu.main()
    assert capsys.readouterr().out == "no GPU is at hand: the Triton kernels were not measured\n"

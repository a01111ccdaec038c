"""Which kernels run is said, can be chosen, and changes nothing quietly."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from twodice.kernels import dispatch

SHOW = (
    "from twodice.kernels import dispatch as d; import sys; "
    "print(d.backend(), d.why(), 'torch' in sys.modules)"
)


def run(**environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SHOW],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_reference_can_be_asked_for() -> None:
    assert run(TWODICE_KERNELS="reference").stdout.startswith("reference TWODICE_KERNELS=reference asks")


def test_a_mode_that_is_not_there_is_an_error_with_the_nearest() -> None:
    assert "did you mean 'native'?" in run(TWODICE_KERNELS="nativ").stderr


@pytest.mark.skipif(dispatch.native is None, reason="no native module")
def test_the_instruction_set_can_be_lowered_and_torch_is_not_loaded() -> None:
    shown = run(TWODICE_KERNELS="native", TWODICE_SIMD="portable").stdout.strip()
    assert shown == "native native module, portable instructions False"
    assert "must be one of portable" in run(TWODICE_SIMD="mmx").stderr


def test_the_facts_for_doctor_agree_with_what_runs() -> None:
    facts = dispatch.facts()
    assert facts["backend"] == dispatch.backend() and facts["why"] == dispatch.why()
    assert (facts["simd"] in facts["simd_levels"]) == (dispatch.native is not None)


def test_the_slow_reference_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(dispatch, "native", None)
    monkeypatch.setattr(dispatch, "_said", False)
    monkeypatch.delenv("TWODICE_KERNELS", raising=False)
    dispatch.say_once_when_slow()
    dispatch.say_once_when_slow()
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "twodice uses its slow reference kernels"
    ]


def test_triton_is_loaded_by_no_tensor_but_one_on_a_gpu() -> None:
    show = (
        "import sys, torch, twodice; x = torch.ones(1, 2, 8, requires_grad=True); "
        "twodice.dropout(x, 0.5, key=1, step=2).sum().backward(); "
        "print([name for name in sys.modules if name.startswith('triton')])"
    )
    ran = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=False)
    assert ran.stdout.strip() == "[]", ran.stderr

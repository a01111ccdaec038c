"""Which kernels run is said, can be chosen, and changes nothing quietly."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import twodice
from twodice.kernels import dispatch

ROOT = Path(__file__).parents[3]

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


def unpacked(package: Path, *beside: str) -> Path:
    """A copy of the package that is running, with these parts of the checkout two folders above."""
    shutil.copytree(Path(twodice.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in beside:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, package.parents[1] / name)
    return package


def shown(package: Path, mode: str = "auto") -> subprocess.CompletedProcess[str]:
    # The working folder comes first on the path, before what PYTHONPATH or an installation would give.
    return subprocess.run(
        [sys.executable, "-c", SHOW], cwd=package.parent, capture_output=True, text=True, check=False,
        env={k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TWODICE_SIMD")}
        | {"TWODICE_KERNELS": mode},
    )  # fmt: skip


OLDER = "reference the native module is older than the source; build it again (make native)"


@pytest.mark.skipif(dispatch.native is None, reason="no native module")
def test_a_module_of_other_sources_than_those_of_the_checkout_is_refused(tmp_path: Path) -> None:
    package = unpacked(tmp_path / "src" / "twodice", "native", "CMakeLists.txt")
    assert shown(package).stdout.startswith("native native module"), "built from these very sources"
    with (tmp_path / "native" / "threads.hpp").open("a") as header:
        header.write("// another day\n")
    assert shown(package).stdout.startswith(OLDER)
    assert "TWODICE_KERNELS=native, but the native module is older" in shown(package, "native").stderr


def test_a_module_from_before_sources_were_told_is_refused_in_a_checkout(tmp_path: Path) -> None:
    package = unpacked(tmp_path / "src" / "twodice", "native", "CMakeLists.txt")
    for module in package.glob("_native*"):
        module.unlink()
    (package / "_native.py").write_text("simd = lambda: 'portable'\n")
    assert shown(package).stdout.startswith(OLDER)


def test_an_installed_module_is_never_held_against_sources(tmp_path: Path) -> None:
    package = unpacked(tmp_path / "lib" / "twodice", "native", "CMakeLists.txt")
    for module in package.glob("_native*"):
        module.unlink()
    (package / "_native.py").write_text("simd = lambda: 'portable'\n")
    assert shown(package).stdout.startswith("native native module, portable instructions")

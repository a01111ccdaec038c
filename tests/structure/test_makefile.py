"""The Makefile's manners: targets are listed, what is missing is said in one line with the remedy."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")


def make(*words: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {
        k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "CXX")
    }
    if path is not None:
        environment["PATH"] = path
    return subprocess.run(
        ["/usr/bin/env", shutil.which("make") or "make", "-C", str(ROOT), "--no-print-directory", *words],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip


def path_with(folder: Path, *names: str) -> str:
    """A PATH of one folder that holds links to these programs alone."""
    for name in names:
        target = shutil.which(name)
        assert target, name
        (folder / name).symlink_to(target)
    return str(folder)


def test_make_alone_lists_the_targets() -> None:
    done = make()
    assert done.returncode == 0
    for target in ("demo", "test", "test-all", "check", "bench"):
        assert f"make {target}" in done.stdout


def test_no_python_is_said_in_one_line_with_the_remedy(tmp_path: Path) -> None:
    only = path_with(tmp_path, "bash", "find", "touch")
    done = make(f"VENV={tmp_path}/venv", f"{tmp_path}/venv/.python", path=only)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(said) == 1 and "Python 3.11" in said[0] and "apt-get install" in said[0]


def test_a_missing_compiler_is_said_in_one_line_with_the_remedy(tmp_path: Path) -> None:
    only = path_with(tmp_path, "bash", "find", "touch")
    python = tmp_path / "python3"
    python.write_text("#!/bin/bash\nexit 0\n")  # says yes to every question: new enough, with venv
    python.chmod(0o755)
    done = make(f"VENV={tmp_path}/venv", f"{tmp_path}/venv/.python", path=only)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(said) == 1 and "C++17 compiler" in said[0] and "g++" in said[0] and "NATIVE=0" in said[0]


def test_ci_runs_make_test() -> None:
    assert "make test" in (ROOT / ".ci" / "run").read_text("utf-8").splitlines()


def test_a_compiler_that_went_away_is_said_in_one_line_when_it_is_needed_again(tmp_path: Path) -> None:
    only = path_with(tmp_path, "bash", "find", "touch")
    (tmp_path / "venv").mkdir()
    for made in (".python", ".dependencies"):
        (tmp_path / "venv" / made).touch()
    done = make(f"VENV={tmp_path}/venv", f"{tmp_path}/venv/.installed", path=only)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(said) == 1 and "C++17 compiler" in said[0]


def test_native_is_built_with_the_programs_of_its_own_environment(tmp_path: Path) -> None:
    for name in ("Makefile", "constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("python", "cmake", "ninja"):
        program = tmp_path / ".venv" / "bin" / name
        program.write_text(f"#!/bin/bash\necho the {name} of the environment\nexit 1\n")
        program.chmod(0o755)
    for made in (".python", ".dependencies"):
        (tmp_path / ".venv" / made).touch()
    (tmp_path / "only").mkdir()
    only = path_with(tmp_path / "only", "bash", "find", "mkdir", "flock", "tail", "dirname")
    done = make("-C", str(tmp_path), "native", "CXX=bash", path=only)
    assert done.returncode != 0 and done.stdout.splitlines() == ["the cmake of the environment"]

"""Philox, its low lanes and dropout in C++ alone, at each instruction level: here, and of Arm in an emulator.

`instruction_levels.cpp` holds each level against the portable loops over widths, offsets, strides, types,
rates and special values, and prints a digest of all that came out, the same on each architecture.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
NATIVE = HERE.parents[2] / "native"
HOST = shutil.which(os.environ.get("CXX", "c++"))
CROSS, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
# Those of CMakeLists.txt, but for the optimisation.
FLAGS = ["-std=c++17", "-ffp-contract=off", "-fno-math-errno", f"-I{NATIVE}"]
OPTIMISED = ["-O1", pytest.param("-O3", marks=pytest.mark.slow)]

needs_compiler = pytest.mark.skipif(HOST is None, reason="no C++ compiler")
needs_arm = pytest.mark.skipif(
    HOST is None or CROSS is None or EMULATOR is None,
    reason="no aarch64-linux-gnu-g++ or no qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)",
)


def built(folder: Path, name: str, compiler: str, optimised: str, *more: str) -> str:
    """Compile into `folder`, once; return the program."""
    program = folder / f"{name}{optimised}"
    if not program.exists():
        source = str(HERE / "instruction_levels.cpp")
        subprocess.run([compiler, *FLAGS, optimised, *more, source, "-o", str(program)], check=True)
    return str(program)


def digest(*command: str) -> tuple[list[str], str]:
    """Run a program that must find no difference; return its levels and its digest."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.findall(r"compared (\d+)", done.stdout)[0]) > 7_000_000
    return re.findall(r"level (\w+)", done.stdout), re.findall(r"digest (\w+)", done.stdout)[0]


def rejected(*command: str) -> bool:
    """Whether a program, told to get rates and counters wrong, says so of each level but the portable."""
    done = subprocess.run([*command, "sabotage"], capture_output=True, text=True)
    levels = re.findall(r"level (\w+)", done.stdout)
    return done.returncode == (len(levels) > 1) and re.findall(r"(\w+) differs", done.stdout) == levels[1:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("levels")


@needs_compiler
@pytest.mark.parametrize("optimised", OPTIMISED)
def test_every_level_here_gives_the_bits_of_the_portable_loops(folder: Path, optimised: str) -> None:
    program = built(folder, "host", str(HOST), optimised)
    levels, _ = digest(program)
    assert levels[0] == "portable" and rejected(program)


@needs_arm
@pytest.mark.parametrize("optimised", OPTIMISED)
def test_neon_gives_the_bits_of_the_portable_loops_and_of_this_machine(folder: Path, optimised: str) -> None:
    arm = [str(EMULATOR), built(folder, "arm", str(CROSS), optimised, "-static")]
    levels, found = digest(*arm)
    assert levels == ["portable", "neon"] and rejected(*arm)
    assert found == digest(built(folder, "host", str(HOST), optimised))[1]

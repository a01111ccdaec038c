"""The team of threads does each part once, leaves torch as it was, and raises what its members raise."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import twodice
from twodice.kernels import dispatch, team

needs_team = pytest.mark.skipif(team._parallel() is None, reason="no runtime of OpenMP to be found")


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_each_part_is_done_once_and_without_gradient(threads: int) -> None:
    done: list[tuple[int, bool]] = []

    def work(numbers: Iterator[int]) -> None:
        done.extend((number, torch.is_grad_enabled()) for number in numbers)

    torch.set_num_threads(threads)
    team.run(work, 20, team.size(20))
    assert sorted(done) == [(number, False) for number in range(20)]
    assert torch.get_num_threads() == threads and torch.is_grad_enabled()


@needs_team
def test_the_threads_work_at_the_same_time_and_their_torch_calls_alone() -> None:
    torch.set_num_threads(2)
    meeting, seen = threading.Barrier(2, timeout=20), []

    def work(numbers: Iterator[int]) -> None:
        for number in numbers:
            meeting.wait()  # comes back only if the other thread has the other part
            a = torch.ones(300, 300)
            seen.append((number, threading.get_ident(), float(torch.mm(a, a)[0, 0])))

    team.run(work, 2, team.size(2))
    assert len({thread for _, thread, _ in seen}) == 2 and {value for *_, value in seen} == {300.0}


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_in_a_part_is_raised(threads: int) -> None:
    torch.set_num_threads(threads)

    def work(numbers: Iterator[int]) -> None:
        for number in numbers:
            if number == 3:
                raise ValueError("part 3")

    with pytest.raises(ValueError, match="part 3"):
        team.run(work, 8, team.size(8))


def test_one_part_or_no_runtime_makes_no_team(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    assert team.size(1) == 1 and team.size(0) == 1
    monkeypatch.setattr(team, "_parallel", lambda: None)
    assert team.size(8) == 1


needs_native = pytest.mark.skipif(dispatch.native is None, reason="no native module")

COUNT = """
import os, sys, torch
from twodice.kernels import dispatch
from twodice.kernels.dropout import dropout  # lends
torch.set_num_threads(2)
x = torch.ones(4, 1024, 256)
torch.mul(x, 2.0)
if sys.argv[1] == "own":
    dispatch.native.lend_threads(0)
before = len(os.listdir("/proc/self/task"))
dropout(x, 6554, 1, 2)
print(len(os.listdir("/proc/self/task")) - before)
"""


@needs_team
@needs_native
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="no list of threads here")
@pytest.mark.parametrize(("which", "more"), [("lent", 0), ("own", 1)])
def test_native_kernels_start_no_threads_beside_those_of_torch(which: str, more: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNT, which], capture_output=True, text=True, check=True, timeout=120
    )
    assert int(done.stdout) == more


@needs_native
def test_lent_threads_and_those_of_our_own_give_the_same_bits() -> None:
    torch.set_num_threads(3)
    x = torch.arange(5 * 1000 * 300, dtype=torch.float32).view(5, 1000, 300)
    try:
        dispatch.native.lend_threads(0)
        own = twodice.dropout(x, 0.1, key=1, step=2)
    finally:
        team.lend()
    lent = twodice.dropout(x, 0.1, key=1, step=2)
    torch.set_num_threads(1)
    assert torch.equal(own, lent) and torch.equal(own, twodice.dropout(x, 0.1, key=1, step=2))

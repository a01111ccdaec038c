"""Checkpoints: whatever fails at whatever moment, the old state or the new is there, and damage is found and
named."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from twodice.errors import CheckpointError
from twodice.random.keys import Key
from twodice.training.checkpoint import (
    Disk,
    Tensors,
    checkpoint_path,
    list_steps,
    newest_checkpoint,
    prune_checkpoints,
    read_tensors,
    save_checkpoint,
    verify_checkpoint,
    write_file,
)

WEIGHTS, OPTIMIZER = "weights.safetensors", "optimizer.safetensors"


def tensors(step: int) -> dict[str, Tensors]:
    return {
        WEIGHTS: {"a": torch.full((3, 5), float(step)), "b": torch.arange(7)},
        OPTIMIZER: {"exp_avg.a": torch.full((3, 5), -float(step))},
    }


def save(folder: Path, step: int, disk: Disk | None = None) -> None:
    save_checkpoint(
        folder,
        step,
        tensors(step),
        {"step": step},
        disk=disk if disk is not None else FailingDisk(10**9, "crash"),
    )


def assert_whole(folder: Path, step: int) -> None:
    path = checkpoint_path(folder, step)
    assert verify_checkpoint(path) == {"step": step}
    assert torch.equal(read_tensors(path, WEIGHTS)["a"], torch.full((3, 5), float(step)))
    assert torch.equal(read_tensors(path, OPTIMIZER)["exp_avg.a"], torch.full((3, 5), -float(step)))


class Crash(BaseException):
    """The process is gone: nothing more is done, not even tidying."""


class FailingDisk(Disk):
    """Does `healthy` operations, then fails in one way at every further one; a write first leaves half a
    file."""

    def __init__(self, healthy: int, way: str) -> None:
        self.left, self.way = healthy, way

    def _fail(self) -> None:
        if self.way == "exit":
            os._exit(7)
        if self.way == "crash":
            raise Crash
        raise OSError(getattr(errno, self.way), os.strerror(getattr(errno, self.way)))

    def _spend(self) -> None:
        self.left -= 1
        if self.left < 0:
            self._fail()

    def make_folder(self, path: Path) -> None:
        self._spend()
        super().make_folder(path)

    def write_bytes(self, path: Path, content: bytes) -> None:
        self.left -= 1
        if self.left < 0:
            path.write_bytes(content[: len(content) // 2])
            self._fail()
        super().write_bytes(path, content)

    def write_tensors(self, path: Path, tensors: Tensors) -> None:
        super().write_tensors(path, tensors)
        self.left -= 1
        if self.left < 0:
            os.truncate(path, path.stat().st_size // 2)
            self._fail()

    def sync(self, path: Path) -> None:
        self._spend()  # whether it fails matters here, not whether it waits

    def rename(self, old: Path, new: Path) -> None:
        self._spend()
        super().rename(old, new)

    def remove(self, path: Path) -> None:
        self.left -= 1
        if self.left < 0:
            # A removal that dies has removed some of the files.
            inside = sorted(path.iterdir()) if path.is_dir() else []
            for file in inside[: len(inside) // 2]:
                file.unlink()
            self._fail()
        super().remove(path)


def attempt(folder: Path, work: Any, healthy: int, way: str) -> bool:
    """Do `work` on a disk that fails after `healthy` operations; true where it was done to the end."""
    if way == "exit":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            work(FailingDisk(healthy, way))
            os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    try:
        work(FailingDisk(healthy, way))
    except (CheckpointError, Crash):
        return False
    return True


WAYS = ["ENOSPC", "EIO", "EROFS", "crash", "exit"]


@pytest.mark.parametrize("way", WAYS)
def test_a_save_that_fails_anywhere_leaves_the_old_state_or_the_new(tmp_path: Path, way: str) -> None:
    for healthy in range(100):
        folder = tmp_path / f"{way}-{healthy}"
        save(folder, 1)
        done = attempt(folder, lambda disk, f=folder: save(f, 2, disk), healthy, way)
        assert_whole(folder, 1)
        assert list_steps(folder) in ([1], [1, 2])
        if 2 in list_steps(folder):
            assert_whole(folder, 2)
        # What was left behind is in nobody's way.
        save(folder, 3)
        prune_checkpoints(folder, {3})
        assert [p.name for p in folder.iterdir()] == ["step-000003"]
        if done:
            break
    else:
        pytest.fail("the save never completed")
    assert healthy >= 12, "a save has at least a dozen operations that can fail"


@pytest.mark.parametrize("way", WAYS)
def test_replacing_a_damaged_checkpoint_never_touches_the_one_before(tmp_path: Path, way: str) -> None:
    for healthy in range(100):
        folder = tmp_path / f"{way}-{healthy}"
        save(folder, 1)
        save(folder, 2)
        (checkpoint_path(folder, 2) / WEIGHTS).write_bytes(b"")
        done = attempt(folder, lambda disk, f=folder: save(f, 2, disk), healthy, way)
        assert_whole(folder, 1)
        found = newest_checkpoint(folder, accept=lambda state: None, warn=lambda text: None)
        assert found is not None and found[0] in (1, 2)
        assert_whole(folder, found[0])
        if done:
            assert found[0] == 2
            break
    else:
        pytest.fail("the save never completed")


@pytest.mark.parametrize("way", WAYS)
def test_replacing_the_only_checkpoint_never_loses_it(tmp_path: Path, way: str) -> None:
    for healthy in range(100):
        folder = tmp_path / f"{way}-{healthy}"
        save(folder, 2)
        done = attempt(folder, lambda disk, f=folder: save(f, 2, disk), healthy, way)
        found = newest_checkpoint(folder, accept=lambda state: None, warn=lambda text: None)
        assert found is not None and found[0] == 2, f"lost after {healthy} operations"
        assert_whole(folder, 2)
        if done:
            break
    else:
        pytest.fail("the save never completed")


@pytest.mark.parametrize("way", WAYS)
def test_a_removal_that_fails_anywhere_never_leaves_half_a_checkpoint(tmp_path: Path, way: str) -> None:
    for healthy in range(100):
        folder = tmp_path / f"{way}-{healthy}"
        for step in (1, 2, 3):
            save(folder, step)
        done = attempt(folder, lambda disk, f=folder: prune_checkpoints(f, {3}, disk=disk), healthy, way)
        for step in list_steps(folder):
            assert_whole(folder, step)
        assert 3 in list_steps(folder)
        if done:
            assert [p.name for p in folder.iterdir()] == ["step-000003"]
            break
    else:
        pytest.fail("the removal never completed")


@pytest.mark.parametrize("way", WAYS)
def test_a_small_file_is_there_whole_or_as_it_was(tmp_path: Path, way: str) -> None:
    for healthy in range(20):
        path = tmp_path / f"{way}-{healthy}.json"
        write_file(path, b"old")
        done = attempt(tmp_path, lambda disk, p=path: write_file(p, b"the new", disk=disk), healthy, way)
        assert path.read_bytes() in (b"old", b"the new")
        if done:
            assert path.read_bytes() == b"the new"
            break
    else:
        pytest.fail("the write never completed")


def test_a_torn_save_would_be_found_out(tmp_path: Path) -> None:
    """Saboteur: a disk that renames before all is written. The check that the tests above rest on must reject
    it."""
    save(tmp_path, 1)
    torn = checkpoint_path(tmp_path, 2)
    shutil.copytree(checkpoint_path(tmp_path, 1), torn)
    (torn / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        verify_checkpoint(torn)


def damaged(folder: Path) -> str:
    """Find the newest whole checkpoint, which must be step 1, and return what was said of step 2."""
    said: list[str] = []
    found = newest_checkpoint(folder, accept=lambda state: None, warn=said.append)
    assert found is not None and found[0] == 1
    assert len(said) == 1 and "step-000002" in said[0]
    return said[0]


def test_every_flipped_bit_is_detected_named_and_passed_over(tmp_path: Path) -> None:
    """200 single bits, spread by key over all bytes of all files of a checkpoint."""
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = checkpoint_path(tmp_path, 2)
    files = sorted(path.iterdir())
    whole = {file: file.read_bytes() for file in files}
    for i in range(200):
        file = files[i % len(files)]
        content = bytearray(whole[file])
        place = Key(5).child("flip", i).value % (8 * len(content))
        content[place // 8] ^= 1 << place % 8
        file.write_bytes(content)
        assert file.name in damaged(tmp_path)
        file.write_bytes(whole[file])
    assert_whole(tmp_path, 2)


def test_truncated_swapped_empty_and_missing_files_are_detected_and_named(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    path = checkpoint_path(tmp_path, 2)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for i in range(12):
            file.write_bytes(whole[: Key(6).child("cut", i).value % len(whole)])
            assert file.name in damaged(tmp_path)
        file.unlink()
        assert file.name in damaged(tmp_path)
        shutil.copyfile(checkpoint_path(tmp_path, 1) / file.name, file)
        if file.name != "manifest.json":
            assert file.name in damaged(tmp_path)
        else:
            damaged(
                tmp_path
            )  # the manifest of step 1 does not fit the files of step 2: one of these is named
        file.write_bytes(whole)
    assert_whole(tmp_path, 2)


def test_nothing_is_found_where_all_are_damaged(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (checkpoint_path(tmp_path, 1) / WEIGHTS).unlink()
    said: list[str] = []
    assert newest_checkpoint(tmp_path, accept=lambda state: None, warn=said.append) is None
    assert len(said) == 1
    assert newest_checkpoint(tmp_path / "none", accept=lambda state: None, warn=said.append) is None


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written_is_said(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="cannot save the checkpoint of step 1"):
        save(tmp_path, 1)
    tmp_path.chmod(0o700)

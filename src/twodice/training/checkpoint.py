"""Checkpoints: safetensors and JSON, a manifest of digests written last, a side folder that is then renamed.

A folder ``step-000120`` is there whole or not at all, whatever moment the process dies at. Nothing is
unpickled. Holds no generator state, because there is none: every random decision is a function of a key and
of the step. Does not know what the tensors mean, nor how training goes on from them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from twodice.errors import CheckpointError

MANIFEST, STATE = "manifest.json", "state.json"
_NAME = re.compile(r"step-(\d{6,})")
_FORMAT = 1

Tensors = dict[str, torch.Tensor]


class Disk:
    """The operations on files that a save is made of, each of which can fail; tests put a failing one in its
    place."""

    def make_folder(self, path: Path) -> None:
        """Make one folder; the parents too."""
        path.mkdir(parents=True, exist_ok=True)

    def write_bytes(self, path: Path, content: bytes) -> None:
        """Write a small file."""
        path.write_bytes(content)

    def write_tensors(self, path: Path, tensors: Tensors) -> None:
        """Write tensors in the safetensors format."""
        save_file(tensors, str(path))

    def sync(self, path: Path) -> None:
        """Wait until a file's content, or a folder's list of names, is on the disk."""
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, old: Path, new: Path) -> None:
        """Give a file or folder its name in one step."""
        os.replace(old, new)

    def remove(self, path: Path) -> None:
        """Remove a folder with all that is in it, or a file, if it is there."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


DISK = Disk()


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` is, or would be."""
    return folder / f"step-{step:06d}"


def list_steps(folder: Path) -> list[int]:
    """Steps that have a checkpoint, rising; whether they are intact is not looked at."""
    if not folder.is_dir():
        return []
    found = (_NAME.fullmatch(path.name) for path in folder.iterdir() if path.is_dir())
    return sorted(int(match.group(1)) for match in found if match)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _manifest_bytes(files: Mapping[str, Mapping[str, Any]]) -> bytes:
    body = {"format": _FORMAT, "files": files}
    inner = json.dumps(body, sort_keys=True).encode()
    # The manifest carries its own digest, so that a flipped bit in it is seen as well.
    return (json.dumps({**body, "sha256": hashlib.sha256(inner).hexdigest()}, sort_keys=True) + "\n").encode()


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensors],
    state: Mapping[str, Any],
    *,
    disk: Disk = DISK,
) -> Path:
    """Write the checkpoint of `step` into `folder` and return its path.

    Parameters
    ----------
    folder
        The run's folder of checkpoints.
    step
        Optimizer steps done, in [0, inf).
    tensors
        Tensors by name, by name of file (``weights.safetensors``); no two may share memory.
    state
        Plain values for ``state.json``.

    Raises
    ------
    CheckpointError
        The disk refused (no space, no right, an error); what was there before is as it was.
    """
    target = checkpoint_path(folder, step)
    side = folder / f".{target.name}.partial"
    try:
        disk.remove(side)
        disk.make_folder(side)
        for name, content in tensors.items():
            disk.write_tensors(side / name, {key: value.contiguous() for key, value in content.items()})
        text = json.dumps(state, indent=1, sort_keys=True, allow_nan=False) + "\n"
        disk.write_bytes(side / STATE, text.encode())
        names = [*tensors, STATE]
        files = {
            name: {"bytes": (side / name).stat().st_size, "sha256": _digest(side / name)} for name in names
        }
        for name in names:
            disk.sync(side / name)
        disk.write_bytes(side / MANIFEST, _manifest_bytes(files))
        disk.sync(side / MANIFEST)
        disk.sync(side)
        if target.exists():
            # A damaged one, or one that a stop has made before the evaluation of its step: it steps aside
            # whole before its place is taken, and the one before it is there all the while.
            old = folder / f".{target.name}.old"
            disk.remove(old)
            disk.rename(target, old)
            disk.rename(side, target)
            disk.remove(old)
        else:
            disk.rename(side, target)
        disk.sync(folder)
    except (OSError, SafetensorError) as error:
        # The half-made folder is worthless, and its space may be what is missing.
        with contextlib.suppress(OSError):
            disk.remove(side)
        raise CheckpointError(f"cannot save the checkpoint of step {step} in {folder}: {error}") from error
    return target


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """Check every file of a checkpoint against the manifest, and return its state.

    Raises
    ------
    CheckpointError
        A file is missing, has another size or another digest; the file is named.
    """
    try:
        raw = (path / MANIFEST).read_bytes()
        files = json.loads(raw)["files"]
        is_whole = raw == _manifest_bytes(files)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: {MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: {MANIFEST} is damaged ({error})") from None
    if not is_whole:
        raise CheckpointError(f"{path}: {MANIFEST} is damaged (its digest does not fit)")
    for name, facts in files.items():
        file = path / name
        try:
            size = file.stat().st_size
            if size != facts["bytes"]:
                raise CheckpointError(f"{path}: {name} must have {facts['bytes']} bytes; it has {size}")
            if _digest(file) != facts["sha256"]:
                raise CheckpointError(f"{path}: {name} is damaged (its SHA-256 does not fit)")
        except FileNotFoundError:
            raise CheckpointError(f"{path}: {name} is missing") from None
        except OSError as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{path}: {name} cannot be read ({error})") from None
    state: dict[str, Any] = json.loads((path / STATE).read_bytes())
    return state


def read_tensors(path: Path, name: str) -> Tensors:
    """Tensors of one file of a verified checkpoint, on the CPU; empty where the checkpoint has no such
    file."""
    file = path / name
    if not file.exists():
        return {}
    tensors: Tensors = load_file(str(file))
    return tensors


def newest_checkpoint(
    folder: Path,
    *,
    accept: Callable[[dict[str, Any]], str | None],
    warn: Callable[[str], None],
) -> tuple[int, dict[str, Any]] | None:
    """Find the newest checkpoint that is whole and that `accept` takes.

    Parameters
    ----------
    folder
        The run's folder of checkpoints.
    accept
        Gets a state, returns None to take it, an empty string to pass it over, or the reason why it is
        damaged.
    warn
        Is told of each damaged checkpoint, with the file, before the one before it is looked at.

    Returns
    -------
    tuple or None
        The step and its state; None where there is none to go on from.
    """
    _take_back(folder)
    for step in reversed(list_steps(folder)):
        path = checkpoint_path(folder, step)
        try:
            state = verify_checkpoint(path)
            reason = accept(state)
            if reason is None:
                return step, state
            if reason:
                raise CheckpointError(f"{path}: {reason}")
        except CheckpointError as error:
            warn(f"damaged checkpoint passed over: {error}")
    return None


def _take_back(folder: Path) -> None:
    """Give whole checkpoints their names again that had stepped aside when the process died.

    Where only one is kept, the one whose place was being taken is the only one there is.
    """
    for old in sorted(folder.glob(".step-*.old")):
        target = folder / old.name.removeprefix(".").removesuffix(".old")
        if target.exists():
            continue
        with contextlib.suppress(CheckpointError):  # half removed: it was on its way out
            verify_checkpoint(old)
            os.replace(old, target)


def prune_checkpoints(folder: Path, keep: Collection[int], *, disk: Disk = DISK) -> None:
    """Remove every checkpoint but those of the steps in `keep`, and what an interrupted save has left.

    A checkpoint loses its name before it loses its files, so that none is ever seen half removed.
    """
    if not folder.is_dir():
        return
    try:
        for step in list_steps(folder):
            if step not in keep:
                path = checkpoint_path(folder, step)
                old = folder / f".{path.name}.old"
                disk.remove(old)
                disk.rename(path, old)
        for path in list(folder.iterdir()):
            if path.name.startswith(".step-"):
                disk.remove(path)
    except OSError as error:
        raise CheckpointError(f"cannot remove old checkpoints in {folder}: {error}") from error


def write_file(path: Path, content: bytes, *, disk: Disk = DISK) -> None:
    """Write a small file so that it is there whole or not at all."""
    side = path.with_name(f".{path.name}.partial")
    try:
        disk.write_bytes(side, content)
        disk.sync(side)
        disk.rename(side, path)
        disk.sync(path.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error}") from error

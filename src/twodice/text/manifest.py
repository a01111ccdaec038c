"""The manifest of a token store: its files, their sizes and digests, and whether they are still so.

This module knows nothing of tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from twodice.errors import DataError

FORMAT = 1
MANIFEST = "manifest.json"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the store in `folder`."""
    file = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        form = manifest["format"]
    except FileNotFoundError as error:
        raise DataError(
            f"{folder} must be a token store; it holds no {MANIFEST}: make one with prepare()"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} must be the manifest of a token store; it is damaged: delete {folder}"
        ) from error
    if form != FORMAT:
        raise DataError(f"{folder} must be a store of format {FORMAT}; it is of format {form}: delete it")
    return manifest


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Add size and SHA-256 of every file in `folder` to `manifest`, make all of it durable, write it last."""
    manifest["files"] = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in sorted(folder.iterdir())
        if file.name != MANIFEST
    }
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
    with (folder / MANIFEST).open("w", encoding="utf-8") as opened:
        json.dump(manifest, opened, indent=1, ensure_ascii=False)
        opened.write("\n")
        opened.flush()
        os.fsync(opened.fileno())


def check_file(file: Path, size: int, digest: str | None) -> None:
    """Raise `DataError` unless `file` has `size` bytes and (where given) the SHA-256 `digest`."""
    if not file.is_file():
        raise DataError(f"{file} must be there; it is missing: delete {file.parent} and prepare it again")
    came = file.stat().st_size
    if came != size:
        raise DataError(
            f"{file} must hold {size} bytes; it holds {came}: delete {file.parent} and prepare it again"
        )
    if digest is not None and sha256_of(file) != digest:
        raise DataError(
            f"{file} does not have the SHA-256 of its manifest: delete {file.parent} and prepare it again"
        )


def map_file(file: Path, kind: np.dtype[Any]) -> npt.NDArray[Any]:
    """A file as a read-only array; an empty file cannot be mapped and is an empty array."""
    if file.stat().st_size == 0:
        return np.empty(0, dtype=kind)
    return np.memmap(file, dtype=kind, mode="r")

"""The two logs of a run: ``metrics.jsonl``, a function of the run alone, and ``timings.jsonl``, of the clock.

They are kept apart so that the first is the same to the byte whether or not the run was interrupted: on
resume it is cut back to what the checkpoint has seen of it. Knows nothing of models.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from twodice.errors import CheckpointError


class MetricsLog:
    """Lines of JSON, appended; its length and digest at a moment are a mark that a checkpoint can store.

    Parameters
    ----------
    path
        The file; made where there is none.
    mark
        What `mark` returned when the checkpoint was saved; the file is cut back to it. None begins anew.

    Raises
    ------
    CheckpointError
        The file does not begin with what the mark says (see `fits`).
    """

    def __init__(self, path: Path, mark: Mapping[str, Any] | None) -> None:
        self._digest = hashlib.sha256()
        self._bytes = 0
        # Evaluations and the like; the many lines of single steps stay in the file.
        self.records: list[dict[str, Any]] = []
        if mark is not None:
            head = read_head(path, mark)
            if head is None:
                raise CheckpointError(f"{path} does not begin with the lines that the checkpoint has seen")
            self._digest.update(head)
            self._bytes = len(head)
            self.records = [r for r in map(json.loads, head.splitlines()) if r["kind"] != "train"]
        self._file: BinaryIO = path.open("r+b" if mark is not None else "wb")
        self._file.truncate(self._bytes)
        self._file.seek(self._bytes)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; it reaches the file by the next `flush` or `mark` at the latest."""
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        self._file.write(line)
        self._digest.update(line)
        self._bytes += len(line)
        if record["kind"] != "train":
            self.records.append(dict(record))

    def flush(self) -> None:
        """Let other programs see the lines."""
        self._file.flush()

    def mark(self) -> dict[str, Any]:
        """Put the lines on the disk and return the length and digest of the file."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}

    def close(self) -> None:
        """Flush and close."""
        self._file.close()


def read_head(path: Path, mark: Mapping[str, Any]) -> bytes | None:
    """The part of the file that `mark` describes, or None where the file does not begin so."""
    try:
        with path.open("rb") as file:
            head = file.read(int(mark["bytes"]))
    except OSError:
        return None
    return head if hashlib.sha256(head).hexdigest() == mark["sha256"] else None


def read_metrics(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The records of a run's ``metrics.jsonl``, all or those of one kind (``"train"``, ``"evaluation"``)."""
    with path.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    return [record for record in records if kind is None or record["kind"] == kind]

"""``records.jsonl``: what a study has found so far, one line a finding, only ever added to.

Every line is written whole and synced before the next is begun; a line that a kill cut short is taken away
when the file is opened to go on. Knows nothing of what a record means, but for the names that tell two
findings apart.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from twodice.errors import ConfigError, DataError

RECORDS = "records.jsonl"
Record = dict[str, Any]

#: What makes a finding of each kind another finding.
IDENTITY = {
    "study": (),
    "tuning": ("arm", "values"),
    "trial": ("arm", "seed"),
    "sanity": (),
    "human": (),
    "sampling": ("arm", "seed", "setting"),
    "example": ("arm", "seed", "setting", "prompt", "draw"),
}


def identity(record: Mapping[str, Any]) -> str:
    """What tells this finding from every other: equal for a finding that was written twice."""
    kind = record.get("kind")
    if kind not in IDENTITY:
        raise DataError(f"a record's kind must be one of {', '.join(IDENTITY)}; got {kind!r}")
    return json.dumps([kind, *(record[name] for name in IDENTITY[kind])], sort_keys=True)


def in_order(records: Iterable[Record]) -> list[Record]:
    """The findings, each once, in an order that does not depend on when they were made."""
    found: dict[str, Record] = {}
    for record in records:
        found.setdefault(identity(record), record)
    return [found[name] for name in sorted(found)]


def read_records(folder: Path) -> list[Record]:
    """The records of a study, each once, sorted; a last line that was cut short is left out.

    Raises
    ------
    DataError
        No records there, or a line before the last that is broken (it is named).
    """
    path = folder / RECORDS
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{folder} must hold a study ({RECORDS}); the system says: {error.strerror}"
        ) from None
    return in_order(_parsed(path, data))


def _parsed(path: Path, data: bytes) -> list[Record]:
    records = []
    for number, line in enumerate(data.split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
            identity(record)
        except (ValueError, KeyError, AttributeError) as error:
            raise DataError(f"{path} line {number} must be a record of a study: {error}") from None
        records.append(record)
    return records


def _lock(file: BinaryIO, folder: Path) -> None:
    """Hold the file against a second study in the same folder; the hold goes with the process."""
    try:
        import fcntl
    except ImportError:  # not a Unix: no lock, and nothing else depends on it
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise ConfigError(
            f"another command is working in {folder}; wait for it, or give another --out"
        ) from None


class Recorder:
    """The file, opened to be added to by one process.

    Parameters
    ----------
    folder
        The study's; made where it is not there.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / RECORDS
        self._file = open(path, "a+b")
        _lock(self._file, folder)
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            self._file.truncate(whole)
        self.records: list[Record] = _parsed(path, data[:whole])
        self._known = {identity(record) for record in self.records}

    def has(self, kind: str, **names: Any) -> bool:
        """Whether this finding is there."""
        return identity({"kind": kind, **names}) in self._known

    def write(self, record: Record) -> None:
        """Add a finding, unless it is there; it is on the disk when this returns."""
        name = identity(record)
        if name in self._known:
            return
        self._file.write((json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.records.append(record)
        self._known.add(name)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

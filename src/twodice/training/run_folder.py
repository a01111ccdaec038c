"""The run's folder: what was asked for, what it was resolved to, and whether a command may go on in it.

``config.json`` is the configuration as resolved; ``run.json`` what was asked for, the reasons, the data's
digest and the machine; ``result.json`` is written when all is done. Does not know the checkpoints' insides.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import twodice
from twodice.errors import ConfigError
from twodice.training.checkpoint import write_file
from twodice.training.config import TrainConfig, make_config, read_config
from twodice.training.metrics import read_metrics

CONFIG, RUN, RESULT, METRICS, TIMINGS = (
    "config.json",
    "run.json",
    "result.json",
    "metrics.jsonl",
    "timings.jsonl",
)
CHECKPOINTS, MODEL = "checkpoints", "model"
_CONTRACT = 1
# What may change between the commands that work on one run: it changes the order of summation only, and is
# warned of.
_MAY_CHANGE = frozenset({"threads"})


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A tree of settings as dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[prefix + name] = value
    return found


def differences(old: TrainConfig, new: TrainConfig) -> list[str]:
    """The settings in which two configurations differ, each as ``name: old there, new here``."""
    before, after = flat(old.model_dump(mode="json")), flat(new.model_dump(mode="json"))
    return [
        f"{name}: {before[name]!r} there, {after[name]!r} here"
        for name in after
        if before[name] != after[name] and name not in _MAY_CHANGE
    ]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the run."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} must hold a JSON object; got a {type(found).__name__}")
    return found


def is_used(out: Path) -> bool:
    """Whether a run has begun in this folder."""
    return (out / RUN).is_file()


def begin_run(out: Path, requested: TrainConfig, resolved: TrainConfig, facts: Mapping[str, Any]) -> None:
    """Write ``config.json``, then ``run.json``, before the first step."""
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / CONFIG, resolved.as_json().encode())
    record = {
        "twodice": twodice.__version__,
        "contract": _CONTRACT,
        "requested": requested.model_dump(mode="json"),
        **facts,
    }
    write_file(out / RUN, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())


def reopen_run(out: Path, requested: TrainConfig) -> tuple[TrainConfig, dict[str, Any]]:
    """Return the configuration as resolved, and the record, of the run in `out`.

    Raises
    ------
    ConfigError
        `requested` is neither what the run was asked for nor what it was resolved to; the difference is
        shown.
    """
    record = read_json(out / RUN)
    resolved = read_config(out / CONFIG)
    asked = make_config(record["requested"], where=str(out / RUN))
    changed = differences(asked, requested)
    if changed and differences(resolved, requested):
        raise ConfigError(
            f"{out} holds a run with another configuration ({'; '.join(changed)}); "
            "give the same settings to go on with it, or another --out"
        )
    return resolved, record


def machine() -> dict[str, Any]:
    """What bit-identity is promised within: the kind of machine and the version of torch."""
    import torch

    return {"processor": _processor(), "system": platform.system(), "torch": torch.__version__}


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


@contextlib.contextmanager
def only_one_in(out: Path) -> Iterator[None]:
    """Hold the folder's lock, so that two commands do not write into one run.

    The lock goes with the process, however that ends.
    """
    try:
        import fcntl
    except ImportError:  # not a Unix: no lock, and nothing else depends on it
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    handle = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"another command is working in {out}; wait for it, or give another --out"
            ) from None
        yield
    finally:
        os.close(handle)


def evaluations(out: Path) -> list[dict[str, Any]]:
    """The records of a run's evaluations, in order."""
    return read_metrics(out / METRICS, "evaluation")

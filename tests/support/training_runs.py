"""Small runs for the tests of training: a little text, a nano model with a short context, and how two runs
are compared."""

from __future__ import annotations

import hashlib
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from twodice.random.keys import Key
from twodice.text.documents import Corpus
from twodice.text.store import TokenStore, prepare
from twodice.training.config import TrainConfig, make_config

PLAN = "embedding=0.1, attention=0.1, residual=0.1"


def tiny_store(folder: Path, *, context: int = 16, documents: int = 40) -> TokenStore:
    """Bytes of some topics of the language reference."""
    texts = [topics[name][:2000] for name in sorted(topics)[:documents]]
    return prepare(Corpus.from_texts(texts), tokenizer="bytes", context=context, key=Key(0), out=folder)


def tiny_config(**changes: Any) -> TrainConfig:
    """A run of some seconds; `changes` are settings by name, groups as dicts."""
    values: dict[str, Any] = {
        "data": ("given",),
        "model": "gpt2-nano",
        "tokenizer": "bytes",
        "context": 16,
        "batch": 8,
        "steps": 6,
        "device": "cpu",
        "threads": 1,
        "evaluation": {"every": 3, "windows": 4},
        "checkpoint": {"every": 2},
    }
    return make_config({**values, **changes})


def fingerprint(out: Path) -> dict[str, str]:
    """Digests of what a run ends with: the weights, the moments, the metrics, the exported model."""
    newest = sorted((out / "checkpoints").glob("step-*"))[-1]
    files = [
        *sorted(newest.iterdir()),
        out / "metrics.jsonl",
        out / "model" / "model.safetensors",
        out / "result.json",
    ]
    return {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files if f.is_file()}


def assert_same_end(one: Path, two: Path) -> None:
    """Both runs ended with the same bits."""
    assert fingerprint(one) == fingerprint(two)

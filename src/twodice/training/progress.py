"""What is kept in mind beside the weights: the best evaluation so far, and the time. Knows no model."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Evaluations without a better one, while the training loss falls, after which a person is told.
_PATIENCE = 3


@dataclass
class Best:
    """The evaluation with the lowest loss on validation A so far, and whether it is time to say that it is
    long past."""

    step: int = 0
    value: float = float("inf")
    train: float = float("inf")
    said: bool = False

    @classmethod
    def from_records(cls, records: list[dict[str, Any]]) -> Best:
        """The best of the records of evaluations, in their order."""
        best = cls()
        for record in records:
            best.see(record)
        return best

    def see(self, record: Mapping[str, Any]) -> bool:
        """Take in one evaluation; true where it is the best so far."""
        if not record["validation_a_nats_per_token"] < self.value:
            return False
        self.step, self.value = record["step"], record["validation_a_nats_per_token"]
        self.train, self.said = record["train_nats_per_token"], False
        return True

    def notices(self, records: list[dict[str, Any]]) -> list[str]:
        """A sentence, once, when validation has stopped improving while the training text is still learnt."""
        since = [record for record in records if record["step"] > self.step]
        if self.said or len(since) < _PATIENCE or not since[-1]["train_nats_per_token"] < self.train:
            return []
        self.said = True
        now = since[-1]
        return [
            (
                f"validation has not improved since step {self.step} ({self.value:.4f} nats, now "
                f"{now['validation_a_nats_per_token']:.4f}) while the training loss fell from "
                f"{self.train:.4f} to {now['train_nats_per_token']:.4f}: the text is being learnt by heart; "
                "model/ will hold the best step"
            )
        ]


class Clock:
    """Tokens a second, into ``timings.jsonl``: what belongs to the machine and not to the run."""

    def __init__(self, path: Path, tokens_per_step: int) -> None:
        self._path, self._tokens_per_step = path, tokens_per_step
        self._began = self._last = time.perf_counter()
        self._first: int | None = None
        self._written = 0
        self.rate = 0.0

    def count(self, step: int) -> None:
        """One more step is done; the rate is over all steps since this process began, evaluations
        included."""
        if self._first is None:
            self._first = step - 1
        elapsed = time.perf_counter() - self._began
        self.rate = (step - self._first) * self._tokens_per_step / elapsed

    def write(self, step: int) -> None:
        """Append a line."""
        if self._first is None:
            return
        seconds = time.perf_counter() - self._began
        line = {"step": step, "seconds": round(seconds, 3), "tokens_per_s": round(self.rate, 1)}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

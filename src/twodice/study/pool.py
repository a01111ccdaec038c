"""Worker processes that stay: jobs go in in order, results come out as they are done.

A worker that dies is named, started again and given its job once more; a second death of the same job is an
error. Knows nothing of what a job is. Does not import torch: the workers do.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from twodice import errors
from twodice.errors import Interrupted, TwodiceError

#: How often a job may lose its worker before that is an error.
_LIVES = 2
_POLL_S = 0.2


@dataclass(frozen=True)
class Job:
    """What is to be done, with what, and whose it is in messages."""

    do: str
    values: dict[str, Any]
    name: str = ""


class _Worker:
    """One process, and the thread that reads its answers."""

    def __init__(
        self, number: int, answers: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]]
    ) -> None:
        self.number = number
        self.job: int | None = None
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "twodice.study.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            encoding="utf-8",
        )
        self._reader = threading.Thread(target=self._read, args=(answers,), daemon=True)
        self._reader.start()

    def _read(self, answers: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]]) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                with suppress(ValueError):  # a line that a death cut short; the end of the pipe says the rest
                    answers.put((self, json.loads(line)))
        answers.put((self, None))

    def send(self, value: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError, ValueError):  # it died: its reader says so
            self.process.stdin.write(json.dumps(value, ensure_ascii=False) + "\n")
            self.process.stdin.flush()

    def end(self) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._reader.join(5)


class Pool:
    """Workers and what they are asked to do.

    Parameters
    ----------
    workers
        How many there are to begin with; `resize` changes it.
    stop
        Polled; once true the running jobs are asked to save, and `Interrupted` is raised.
    say
        Is told in words when a worker died.
    """

    def __init__(self, workers: int, *, stop: Callable[[], bool], say: Callable[[str], None]) -> None:
        self._answers: queue.SimpleQueue[tuple[_Worker, dict[str, Any] | None]] = queue.SimpleQueue()
        self._stop, self._say = stop, say
        self._workers = [_Worker(i, self._answers) for i in range(workers)]

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            assert worker.process.stdin is not None
            with suppress(BrokenPipeError):
                worker.process.stdin.close()
        for worker in self._workers:
            worker.end()

    @property
    def pids(self) -> list[int]:
        """The process ids of the workers."""
        return [worker.process.pid for worker in self._workers]

    def resize(self, workers: int) -> None:
        """Have `workers` of them; what they keep open stays with those that stay."""
        while len(self._workers) > workers:
            self._workers.pop().end()
        while len(self._workers) < workers:
            self._workers.append(_Worker(len(self._workers), self._answers))

    def all(self, jobs: Iterable[Job]) -> list[Any]:
        """The results of all jobs, in the order of the jobs."""
        listed = list(jobs)
        results: list[Any] = [None] * len(listed)
        for index, value in self.run(listed):
            results[index] = value
        return results

    def run(
        self, jobs: Iterable[Job], on_progress: Callable[[int, dict[str, Any]], None] | None = None
    ) -> Iterator[tuple[int, Any]]:
        """Do the jobs, begun in their order, and yield (index, result) as they are done.

        Raises
        ------
        Interrupted
            `stop` became true; the running jobs have saved.
        TwodiceError
            A job failed (its own error), or lost its worker twice.
        """
        listed = list(jobs)
        waiting = deque(range(len(listed)))
        lives = [_LIVES] * len(listed)
        left = len(listed)
        stopping = False
        while left:
            if self._stop() and not stopping:
                stopping = True
                for worker in self._workers:
                    worker.send({"do": "stop"})
            if stopping and all(worker.job is None for worker in self._workers):
                raise Interrupted("the study was asked to stop; the same command goes on from there")
            for worker in self._workers:
                if not stopping and worker.job is None and waiting:
                    worker.job = waiting.popleft()
                    job = listed[worker.job]
                    worker.send({"id": worker.job, "do": job.do, "with": job.values})
            try:
                worker, answer = self._answers.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if worker not in self._workers:
                continue
            if answer is None:
                self._replace(worker, listed, lives, waiting, stopping)
                continue
            index, kind = worker.job, answer["kind"]
            if index is None or answer["id"] != index:
                continue
            if kind in ("progress", "notice"):
                if on_progress is not None:
                    on_progress(index, answer)
                continue
            worker.job = None
            if kind == "error":
                found = getattr(errors, answer["error"], TwodiceError)
                name = listed[index].name
                raise found(f"{name}: {answer['text']}" if name else answer["text"])
            if kind == "result":
                left -= 1
                yield index, answer["value"]

    def _replace(
        self, worker: _Worker, listed: list[Job], lives: list[int], waiting: deque[int], stopping: bool
    ) -> None:
        index, code = worker.job, worker.process.wait()
        place = self._workers.index(worker)
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        what = "between two jobs" if index is None else f"during {listed[index].name or listed[index].do}"
        worker.job = None
        worker.end()
        if stopping:
            return
        if index is not None:
            lives[index] -= 1
            if lives[index] == 0:
                raise TwodiceError(
                    f"a worker died {how} {what}, {_LIVES} times; is there too little memory? "
                    "The same command goes on from the last checkpoint"
                )
            waiting.appendleft(index)
        elif code != 0:
            lives_left = sum(1 for w in self._workers if w is not worker)
            if code == 1 and not lives_left:
                raise TwodiceError("the worker cannot start; its message stands above")
        self._say(f"a worker died {how} {what}; it is started again and goes on from the last checkpoint")
        self._workers[place] = _Worker(worker.number, self._answers)

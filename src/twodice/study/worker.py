"""A process that does one job of a study after another: prepare the text, measure, train a trial, generate.

Started by `pool`, told what to do by lines of JSON on its standard input, it answers by lines of JSON on what
was its standard output (which it moves away first, so that no library's print can break a line). It lives as
long as the study: starting torch and transformers costs more than a small trial. When its input ends, the
study is gone and it ends at once. Knows the jobs; does not know arms, records or statistics.
"""

from __future__ import annotations

import json
import os
import platform
import queue
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from twodice.errors import CheckpointError, DataError, Interrupted, TwodiceError
from twodice.study.spec import B_WINDOWS
from twodice.training.config import TrainConfig, make_config

Answer = Callable[[dict[str, Any]], None]
JOBS = ("prepare", "measure", "rehearse", "train", "generate", "human", "sanity")
_TELL_EVERY_S = 0.5


class Jobs:
    """The jobs, by name; what is costly to open is kept between them."""

    def __init__(self, answer: Answer, stop: Callable[[], bool]) -> None:
        self._answer, self._stop = answer, stop
        self._stores: dict[str, Any] = {}
        self._copies: dict[str, Any] = {}

    def prepare(self, config: TrainConfig, folder: str, begun: bool) -> dict[str, Any]:
        """Make or open the store of tokens; settle what is left open; say what is there."""
        from twodice.training.budget import num_parameters, resolve
        from twodice.training.models import build_model
        from twodice.training.run_folder import machine
        from twodice.training.tokens import store_for

        notices: list[str] = []
        store = store_for(config, folder, begun=begun, say=notices.append)
        self._stores[folder] = store
        steps = config if config.steps is not None else config.model_copy(update={"steps": 1})
        resolved = resolve(steps, store).config
        model, notes = build_model(resolved, store)
        splits = store.splits
        return {
            "notices": [*notices, *notes],
            "data": {
                "sources": list(config.data),
                "share": config.share,
                "documents": sum(len(store.texts(name)) for name in splits),
                "train_tokens": int(splits["train"].num_tokens),
                "train_bytes": int(splits["train"].num_bytes),
                "validation_a_tokens": int(splits["validation_a"].num_tokens),
                "validation_b_tokens": int(splits["validation_b"].num_tokens),
                "validation_b_bytes": int(splits["validation_b"].num_bytes),
                "vocabulary": int(store.vocabulary),
                "tokenizer": str(store.manifest["tokenizer"]),
                "crosses_documents": bool(store.crosses_documents),
                "digest": store.digest,
                "entropy_nats_per_token": store.entropy_nats_per_token,
            },
            "model": {
                "name": config.model,
                "parameters": num_parameters(model),
                "context": resolved.context,
                "batch": resolved.batch,
            },
            "lr": resolved.optimizer.lr,
            "windows": int(splits["train"].num_windows(resolved.context))
            if resolved.context is not None
            else 0,
            "machine": {
                **{name: str(value) for name, value in machine().items()},
                "python": platform.python_version(),
            },
        }

    def measure(self, config: TrainConfig, folder: str, threads: int) -> dict[str, Any]:
        """Seconds of a step and of an evaluation at `threads`, from a few real ones."""
        from twodice.training.budget import resolve, resolve_for_measurement
        from twodice.training.measure import measure_speed
        from twodice.training.step import choose_device

        self._threads(threads)
        store = self._store(folder)
        settled = resolve_for_measurement(resolve(config.model_copy(update={"steps": 200}), store).config)
        speed = measure_speed(settled, store, choose_device(config.device))
        return {"step_s": speed.step_s, "evaluation_s": speed.evaluation_s}

    def rehearse(self, config: TrainConfig, folder: str, threads: int) -> dict[str, Any]:
        """Seconds of a whole small trial, export and all, in a folder that is thrown away."""
        with tempfile.TemporaryDirectory(prefix="twodice-rehearsal-") as out:
            began = time.perf_counter()
            found = self.train(config, folder, str(Path(out) / "trial"), threads, B_WINDOWS, mechanisms=True)
            return {"seconds": time.perf_counter() - began, "evaluations": len(found["evaluations"])}

    def train(
        self,
        config: TrainConfig,
        folder: str,
        out: str,
        threads: int,
        b_windows: int | None = None,
        mechanisms: bool = False,
    ) -> dict[str, Any]:
        """One trial, begun or gone on with; its evaluations, its losses on so much of validation B, and what
        dropout did inside."""
        from twodice.training.loop import score_validation_b, train

        self._threads(threads)
        last = 0.0

        def on_event(event: Any) -> None:
            nonlocal last
            now = time.monotonic()
            if event["kind"] == "train" and now - last >= _TELL_EVERY_S:
                last = now
                self._answer({"kind": "progress", "step": event["step"]})
            elif event["kind"] in ("warning", "resumed"):
                text = event.get("text", f"goes on from step {event.get('step')}")
                self._answer({"kind": "notice", "text": text})

        result = train(config, self._store(folder), out, on_event=on_event, stop=self._stop)
        found = {"steps": result.steps, "best_step": result.best_step, "evaluations": result.evaluations}
        if b_windows is not None:
            try:
                found["validation_b"] = score_validation_b(
                    out, self._store(folder), b_windows, stop=self._stop
                )
            except CheckpointError as error:
                text = f"scored on the windows of its evaluations only, as all trials then are: {error}"
                self._answer({"kind": "notice", "text": text})
        if mechanisms:
            found |= self._mechanisms(folder, out)
        return found

    def _mechanisms(self, folder: str, out: str) -> dict[str, Any]:
        """What dropout did inside the best model of a trial; nothing where it cannot be read."""
        from twodice.study.mechanisms.measure import measure_trial

        try:
            return {"mechanisms": asdict(measure_trial(out, self._store(folder)))}
        except TwodiceError as error:
            self._answer({"kind": "notice", "text": f"not measured inside: {error}"})
            return {}

    def generate(self, folder: str, model: str, threads: int, plan: dict[str, Any]) -> dict[str, Any]:
        """The second die, thrown with one trained model in every setting."""
        from twodice.study.sampling_cross import cross_of_model, training_copies

        self._threads(threads)
        store = self._store(folder)
        if folder not in self._copies:
            self._copies[folder] = training_copies(store)
        return cross_of_model(model, store, self._copies[folder], plan, self._stop)

    def human(self, folder: str, plan: dict[str, Any]) -> dict[str, Any]:
        """The same measures on the held-out text itself."""
        from twodice.study.sampling_cross import measure_human, training_copies

        store = self._store(folder)
        if folder not in self._copies:
            self._copies[folder] = training_copies(store)
        return measure_human(store, self._copies[folder], plan)

    def sanity(self, folder: str) -> dict[str, Any]:
        """The numbers that a loss can be held against."""
        from twodice.study.sanity import sanity_of

        return {"items": sanity_of(self._store(folder))}

    def _store(self, folder: str) -> Any:
        from twodice.text.store import TokenStore

        if folder not in self._stores:
            self._stores[folder] = TokenStore.open(folder)
        return self._stores[folder]

    @staticmethod
    def _threads(count: int) -> None:
        import torch

        torch.set_num_threads(count)


def _do(jobs: Jobs, order: dict[str, Any]) -> dict[str, Any]:
    values = dict(order["with"])
    if "config" in values:
        values["config"] = make_config(values["config"])
    if order["do"] not in JOBS:
        raise DataError(f"a job must be one of {', '.join(JOBS)}; got {order['do']!r}")
    found: dict[str, Any] = getattr(jobs, order["do"])(**values)
    return found


def main() -> None:
    """Take orders until the input ends."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    writing = threading.Lock()
    current: list[int] = [-1]

    def answer(value: dict[str, Any]) -> None:
        with writing:
            channel.write(json.dumps({"id": current[0], **value}, ensure_ascii=False) + "\n")
            channel.flush()

    orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    asked = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            order = json.loads(line)
            if order.get("do") == "stop":
                asked.set()
            else:
                orders.put(order)
        os._exit(0)  # the study is gone; a run's folder stands a kill at any moment

    # The study decides when to stop: the keyboard's signal reaches the whole group of processes.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=listen, daemon=True).start()
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    import torch  # noqa: F401  (now, while the study still settles what to do)

    jobs = Jobs(answer, asked.is_set)
    answer({"kind": "ready"})
    while True:
        order = orders.get()
        current[0] = order["id"]
        try:
            result = _do(jobs, order)
        except Interrupted as error:
            answer({"kind": "interrupted", "text": str(error)})
        except TwodiceError as error:
            answer({"kind": "error", "error": type(error).__name__, "text": str(error)})
        except Exception as error:
            import traceback

            traceback.print_exc()
            answer({"kind": "error", "error": "TwodiceError", "text": f"{type(error).__name__}: {error}"})
        else:
            answer({"kind": "result", "value": result})


if __name__ == "__main__":
    main()

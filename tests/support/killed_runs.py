"""Runs a training again and again in processes that are killed with SIGKILL at moments drawn by key.

``python -m tests.support.killed_runs FOLDER KILLS`` trains once without harm into FOLDER/whole, then into
FOLDER/killed until KILLS processes were killed while they worked, and once more to the end. Each process is a
fork of this one, which has only imported what it needs, so that no time goes into starting; a killed fork
gets no moment to tidy up.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

from tests.support.training_runs import PLAN, tiny_config, tiny_store
from twodice.random.keys import Key
from twodice.training.loop import train

CONFIG = tiny_config(steps=24, dropout=PLAN, evaluation={"every": 4, "windows": 4}, checkpoint={"every": 1})


def start(out: Path, store_folder: Path) -> int:
    """Fork a process that trains into `out`, and return its number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        try:
            train(CONFIG, tiny_store(store_folder), out)
            status = 0
        finally:
            os._exit(status)
    return child


def finish(child: int) -> int:
    """Wait for a process and return its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path, kills: int) -> None:
    """Do what the module's docstring says, and print the steps at which the kills fell."""
    import torch
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    torch.set_num_threads(1)
    tiny_store(folder / "tokens")
    began = time.monotonic()
    assert finish(start(folder / "whole", folder / "tokens")) == 0
    took = time.monotonic() - began
    steps: list[int] = []
    for attempt in range(50 * kills):
        child = start(folder / "killed", folder / "tokens")
        # Up to a share of the whole run's time, so that the kills fit into one run.
        moment = took * (0.1 + 0.9 * Key(1).child("kill", attempt).value / 2**64) * min(1.0, 3 / kills)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        if finish(child) != -signal.SIGKILL:
            # It was done before: begin the same again, so that every kill that counts fell into work.
            if len(steps) >= kills:
                break
            os.rename(folder / "killed", folder / f"killed-{attempt}")
            continue
        there = sorted((folder / "killed" / "checkpoints").glob("step-*"))
        steps.append(int(there[-1].name[5:]) if there else -1)
        if len(steps) >= kills:
            break
    assert finish(start(folder / "killed", folder / "tokens")) == 0
    print(json.dumps(steps))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

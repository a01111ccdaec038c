"""Trains with the Hugging Face Trainer in processes that are killed with SIGKILL at moments drawn by key.

``python -m tests.support.killed_trainers FOLDER KILLS`` trains each family once without harm, then kills and
resumes the same run KILLS times, each time after its first checkpoint, and lets it end. Prints whether the
weights are the same bits, and after which steps it was resumed. Each process is a fork of this one, which has
only imported what it needs.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer

import twodice
from tests.support.tiny_trainer import PLAN, tiny_trainer, weights
from twodice.random.keys import Key

SETTINGS: dict[str, dict[str, Any]] = {
    "gpt2": {"max_steps": 14},
    "llama": {"max_steps": 14, "activation_checkpointing": True},
}


def start(folder: Path, family: str, resume: bool) -> int:
    """Fork a process that trains, and return its number."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 1
        try:
            silent = os.open(os.devnull, os.O_WRONLY)
            os.dup2(silent, 1)
            callback = twodice.DropoutCallback(PLAN, seed=5)
            trainer: Trainer = tiny_trainer(folder, callback, family=family, **SETTINGS[family])
            trainer.train(resume_from_checkpoint=resume or None)
            save_file({"all": weights(trainer.model)}, folder / "end.safetensors")
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def finish(child: int) -> int:
    """Wait for a process and return its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def whole_checkpoints(folder: Path) -> list[int]:
    """Remove the checkpoint that a kill tore, as its user must (the Trainer writes in place), and list the
    others.
    """
    steps = []
    for checkpoint in folder.glob("checkpoint-*"):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())  # what the Trainer writes last
            steps.append(int(checkpoint.name.rpartition("-")[2]))
        except (OSError, ValueError):
            shutil.rmtree(checkpoint)
    return sorted(steps)


def killed(folder: Path, family: str, kills: int, took: float) -> list[int]:
    """Train with kills, and return the steps from which it went on."""
    resumed: list[int] = []
    for attempt in range(20 * kills):
        if len(resumed) == kills:
            break
        child = start(folder, family, bool(resumed))
        known = resumed[-1] if resumed else 0
        while (
            not any(int(c.parent.name[11:]) > known for c in folder.glob("checkpoint-*/trainer_state.json"))
            and os.waitpid(child, os.WNOHANG)[0] == 0
        ):
            time.sleep(0.002)
        time.sleep(took / kills * Key(2).child("kill", attempt).value / 2**64)
        try:
            os.kill(child, signal.SIGKILL)
            fell = finish(child) == -signal.SIGKILL
        except (ProcessLookupError, ChildProcessError):
            fell = False
        if fell:
            resumed.append(whole_checkpoints(folder)[-1])
        else:  # it was done before: begin the same again
            shutil.rmtree(folder)
            resumed = []
    assert finish(start(folder, family, True)) == 0
    return resumed


def main(folder: Path, kills: int) -> None:
    """Do what the module's docstring says."""
    torch.set_num_threads(1)
    found = {}
    for family in SETTINGS:
        began = time.monotonic()
        assert finish(start(folder / family / "whole", family, False)) == 0
        took = time.monotonic() - began
        steps = killed(folder / family / "killed", family, kills, took / 2)
        ends = [load_file(folder / family / run / "end.safetensors")["all"] for run in ("whole", "killed")]
        found[family] = {"equal": torch.equal(*ends), "resumed": steps}
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

"""Trains by the Trainer of transformers on ranks: ``python -m tests.support.rank_trainers FOLDER RANKS``.

Ranks are forks that speak by gloo; the first writes the weights at the end into ``FOLDER/end.safetensors``.
Each step has 8 rows, whatever the number of ranks.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers.models.gpt2.modeling_gpt2  # noqa: F401
from safetensors.torch import save_file
from transformers import Trainer

import twodice
from tests.support.tiny_trainer import tiny_trainer, weights

PLAN = "embedding=0.1, attention=0.1, residual=0.1, activation=0.1, layer:batch=0.3"
SETTINGS: dict[str, Any] = {
    "max_steps": 3, "rows": 24, "optim": "sgd", "learning_rate": 1e-2, "eval_strategy": "no",
    "save_strategy": "no", "per_device_train_batch_size": 2,
}  # fmt: skip


def work(folder: Path, ranks: int, kind: type = twodice.DropoutCallback) -> torch.Tensor:
    """Train on one of `ranks` ranks and return the weights."""
    trainer: Trainer = tiny_trainer(
        folder, kind(PLAN, seed=5), gradient_accumulation_steps=4 // ranks,
        ddp_backend="gloo" if ranks > 1 else None, **SETTINGS,
    )  # fmt: skip
    trainer.train()
    return weights(trainer.model)


def main(folder: Path, ranks: int) -> None:
    """Do what the module's docstring says."""
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            status = 1
            try:
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                found = work(folder, ranks)
                if rank == 0:
                    save_file({"all": found}, folder / "end.safetensors")
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    if any([os.waitpid(child, 0)[1] for child in children]):
        raise SystemExit("a rank failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))

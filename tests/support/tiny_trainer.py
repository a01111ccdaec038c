"""A Hugging Face Trainer on a model of a few thousand weights, the same every time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.support.tiny_models import tiny_model, tokens

PLAN = "embedding=0.1, attention=0.1, residual=linear(0.0, 0.3), activation=0.1, output=plateau(0.2, 0.5)"


class Rows(torch.utils.data.Dataset):
    """The first rows of `tokens`, as the Trainer takes them; turned round they are text of another kind."""

    def __init__(self, rows: int, turned: bool = False) -> None:
        self.ids = tokens(rows).flip(1) if turned else tokens(rows)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[row], "labels": self.ids[row]}


def tiny_trainer(
    out: Path,
    *callbacks: Any,
    family: str = "gpt2",
    rows: int = 20,
    kind: Any = None,
    model: Any = None,
    **settings: Any,
) -> Any:
    """Return a Trainer of a tiny model with 8 rows a step, which evaluates and saves every second step."""
    import transformers

    plain = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 6, "use_cpu": True,
        "report_to": [], "disable_tqdm": True, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2,
        "save_steps": 2, "learning_rate": 5e-2, "seed": 3,
    }  # fmt: skip
    return (kind or transformers.Trainer)(
        tiny_model(family) if model is None else model,
        transformers.TrainingArguments(output_dir=str(out), **{**plain, **settings}),
        train_dataset=Rows(rows),
        eval_dataset=Rows(6, turned=True),
        callbacks=list(callbacks),
    )


def weights(model: Any) -> torch.Tensor:
    """Return all weights of a model in one row."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])

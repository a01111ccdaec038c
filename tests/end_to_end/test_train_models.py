"""Runs of each family, and fine-tuning of a local folder on records with completions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.training_runs import PLAN, tiny_config, tiny_store

from twodice.errors import CheckpointError
from twodice.random.keys import Key
from twodice.text.store import TokenStore
from twodice.training import export
from twodice.training.config import make_config
from twodice.training.evaluate import IGNORED, FixedWindows
from twodice.training.loop import export_run, train
from twodice.training.metrics import read_metrics
from twodice.training.tokens import store_for


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return tiny_store(tmp_path_factory.mktemp("models") / "tokens")


@pytest.mark.parametrize("model", ["gpt2-nano", "llama-nano"])
def test_five_steps_of_each_family_lower_the_loss(store: TokenStore, tmp_path: Path, model: str) -> None:
    config = tiny_config(model=model, steps=5, dropout=PLAN, optimizer={"warmup": 0})
    result = train(config, store, tmp_path / "run")
    first, last = result.evaluations[0], result.evaluations[-1]
    assert last["train_nats_per_token"] < first["train_nats_per_token"] - 0.3
    assert result.model is not None and (result.model / "model.safetensors").is_file()


def test_a_folder_that_would_load_as_another_model_is_refused(
    store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = export._model_config
    monkeypatch.setattr(export, "_model_config", lambda model: {**written(model), "layer_norm_epsilon": 0.1})
    with pytest.raises(CheckpointError, match=r"must give the logits of the trained one to 1e-05"):
        train(tiny_config(steps=1), store, tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "result.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gpt2-micro", "llama-micro", "gpt2-small", "llama-small"])
def test_five_steps_of_the_larger_presets_lower_the_loss(
    store: TokenStore, tmp_path: Path, model: str
) -> None:
    config = tiny_config(model=model, steps=5, dropout=PLAN, optimizer={"warmup": 0})
    result = train(config, store, tmp_path / "run")
    assert result.evaluations[-1]["train_nats_per_token"] < result.evaluations[0]["train_nats_per_token"]


def test_the_loss_falls_to_the_true_entropy_and_never_below(tmp_path: Path) -> None:
    """A Markov source has a known entropy; a model that went below it on validation text would be reading the
    answer."""
    config = make_config(
        {
            "data": ("markov:bytes=60000",), "model": "gpt2-nano", "context": 32, "steps": 60, "batch": 16,
            "device": "cpu", "threads": 1, "evaluation": {"windows": 64}, "checkpoint": {"every": 100},
        }
    )  # fmt: skip
    tokens = store_for(config, tmp_path / "tokens")
    assert tokens.entropy_nats_per_token is not None
    result = train(config, tokens, tmp_path / "run", export=False)
    found = result.evaluations[-1]["validation_b_nats_per_token"]
    assert result.evaluations[0]["validation_b_nats_per_token"] - found > 1
    assert found > tokens.entropy_nats_per_token - 0.1
    assert result.model is None
    assert export_run(tmp_path / "run", tokens).is_dir()


def records(path: Path) -> Path:
    lines = []
    for i in range(60):
        number = Key(3).child("number", i).value % 90 + 10
        lines.append({"prompt": f"double {number} is ", "completion": f"{2 * number}"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_fine_tuning_a_folder_on_records_counts_the_completion_only(
    store: TokenStore, tmp_path: Path
) -> None:
    base = train(
        tiny_config(steps=3, context=32), tiny_store(tmp_path / "tokens", context=32), tmp_path / "base"
    )
    assert base.model is not None
    # Rates of the model's own, as published GPT-2 folders have them.
    shape = json.loads((base.model / "config.json").read_text())
    shape.update(resid_pdrop=0.1, attn_pdrop=0.1)
    (base.model / "config.json").write_text(json.dumps(shape))

    config = make_config(
        {
            "data": (str(records(tmp_path / "records.jsonl")),), "model": str(base.model), "steps": 20,
            "batch": 8, "device": "cpu", "threads": 1, "optimizer": {"lr": 1e-3, "warmup": 0},
            "checkpoint": {"every": 10},
            "evaluation": {"every": 20}, "dropout": "residual=0.05",
        }
    )  # fmt: skip
    tokens = store_for(config, tmp_path / "tuned" / "tokens")
    assert tokens.completion_only
    targets = FixedWindows(tokens, 32, 8).targets_NT["train"]
    counted = targets != IGNORED
    # Two or three digits and the end of the document count, of some twenty tokens.
    assert set(counted.sum(1).tolist()) <= {3, 4}
    digits = targets[counted]
    assert set(digits.tolist()) <= {*range(ord("0"), ord("9") + 1), tokens.end_of_document}

    events: list[Mapping[str, Any]] = []
    result = train(config, tokens, tmp_path / "tuned", on_event=events.append)
    said = [event["text"] for event in events if event["kind"] == "notice"]
    assert "resid_pdrop 0.1" in said[0] and "is set to 0" in said[0]
    assert (
        result.evaluations[-1]["train_nats_per_token"] < result.evaluations[0]["train_nats_per_token"] - 0.5
    )
    resolved = next(event for event in events if event["kind"] == "resolved")
    assert (
        resolved["config"].tokenizer == str(base.model)
        and resolved["reasons"]["tokenizer"] == "the model's own"
    )

    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert result.model is not None
    loaded = AutoModelForCausalLM.from_pretrained(result.model)
    tokenizer = AutoTokenizer.from_pretrained(result.model)
    assert tokenizer("double")["input_ids"] == list(b"double")
    with torch.no_grad():
        assert bool(torch.isfinite(loaded(torch.tensor([list(b"double 21 is ")])).logits).all())


def test_a_notice_says_when_validation_has_stopped_improving(tmp_path: Path) -> None:
    tokens = tiny_store(tmp_path / "tokens", documents=1)
    config = tiny_config(
        steps=120, optimizer={"lr": 5e-3}, evaluation={"every": 10, "windows": 16}, checkpoint={"every": 200}
    )
    events: list[Mapping[str, Any]] = []
    result = train(config, tokens, tmp_path / "run", on_event=events.append, export=False)
    said = [event["text"] for event in events if event["kind"] == "notice"]
    assert len(said) == 1 and f"validation has not improved since step {result.best_step}" in said[0]
    assert result.best_step < 120


def test_a_length_in_minutes_is_measured_and_kept(store: TokenStore, tmp_path: Path) -> None:
    """0.05 minutes are 3 s; the steps are settled before the first one and written down."""
    result = train(tiny_config(steps=None, minutes=0.05), store, tmp_path / "run", export=False)
    resolved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert resolved["steps"] == result.steps > 3 and resolved["minutes"] is None
    assert "0.05 minutes at" in json.loads((tmp_path / "run" / "run.json").read_text())["reasons"]["steps"]
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl", "train")) == result.steps

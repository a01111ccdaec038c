"""What is left open is settled by rules that are written down, each with its reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.support.training_runs import tiny_store

from twodice.errors import ConfigError
from twodice.text.store import TokenStore
from twodice.training.budget import Resolved, Speed, resolve, resolve_text
from twodice.training.config import TrainConfig, make_config
from twodice.training.progress import Best


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return tiny_store(tmp_path_factory.mktemp("budget") / "tokens", context=32)


def settle(store: TokenStore, **changes: Any) -> Resolved:
    return resolve(make_config({"tokenizer": "bytes", "context": 32, **changes}), store)


def test_nothing_is_left_open_and_each_derived_value_has_a_reason(store: TokenStore) -> None:
    found = settle(store)
    values = found.config
    assert None not in (
        values.steps,
        values.batch,
        values.context,
        values.optimizer.lr,
        values.optimizer.min_lr,
    )
    assert None not in (values.optimizer.warmup, values.evaluation.every, values.checkpoint.every)
    for name in (
        "steps",
        "batch",
        "optimizer.lr",
        "optimizer.min_lr",
        "optimizer.warmup",
        "evaluation.every",
    ):
        assert found.reasons[name]
    assert "context" not in found.reasons, "it was given"


def test_resolving_again_changes_nothing(store: TokenStore) -> None:
    once = settle(store, epochs=3).config
    assert resolve(once.model_copy(update={"epochs": None}), store).config.model_dump() == {
        **once.model_dump(),
        "epochs": None,
    }


def test_epochs_are_turned_into_steps(store: TokenStore) -> None:
    windows = store.splits["train"].num_windows(32)
    assert settle(store, epochs=2, batch=8).config.steps == round(2 * windows / 8)


def test_minutes_are_turned_into_steps_by_the_measured_speed(store: TokenStore) -> None:
    config = make_config({"tokenizer": "bytes", "context": 32, "minutes": 1})
    found = resolve(config, store, lambda candidate: Speed(step_s=0.1, evaluation_s=0.2, peak_bytes=0))
    steps, every = found.config.steps, found.config.evaluation.every
    assert steps is not None and every is not None
    assert 57 < steps * 0.1 + (steps // every + 1) * 0.2 < 60 * 0.97
    assert found.config.minutes is None and "100 ms a step, measured here" in found.reasons["steps"]


def test_a_batch_is_no_larger_than_the_text_and_fits_accumulate(tmp_path: Path) -> None:
    little = tiny_store(tmp_path / "tokens", documents=1, context=64)
    windows = little.splits["train"].num_windows(64)
    found = resolve(make_config({"tokenizer": "bytes", "context": 64, "steps": 3}), little)
    assert found.config.batch is not None and found.config.batch <= windows < 16
    assert f"{windows} windows only" in found.reasons["batch"]
    found = resolve(make_config({"tokenizer": "bytes", "context": 64, "steps": 3, "accumulate": 3}), little)
    assert found.config.batch is not None and found.config.batch % 3 == 0


def test_evaluations_take_no_more_than_their_share_of_the_time(store: TokenStore) -> None:
    """One of 64 windows at batch 16 costs four steps: every 27 steps is 15 %, a fifth of the run at most."""
    for steps, every in ((2000, 100), (400, 27), (60, 12), (3, 1)):
        assert settle(store, steps=steps).config.evaluation.every == every


def test_markov_is_read_as_bytes_and_a_plan_that_cannot_be_meant_is_refused_first() -> None:
    assert resolve_text(make_config({"data": ("markov:bytes=1000",)})).config.tokenizer == "bytes"
    assert resolve_text(TrainConfig()).config.tokenizer == "bpe"
    with pytest.raises(ConfigError):
        resolve_text(make_config({"dropout": "resdual=0.1"}))


def test_a_floor_above_the_peak_is_refused(store: TokenStore) -> None:
    with pytest.raises(ConfigError, match=r"min_lr must be at most lr 0\.001; got 0\.01"):
        settle(store, optimizer={"lr": 1e-3, "min_lr": 1e-2})


def record(step: int, train: float, validation: float) -> dict[str, Any]:
    return {"step": step, "train_nats_per_token": train, "validation_a_nats_per_token": validation}


def test_the_best_is_the_first_of_equal_ones_and_the_notice_comes_once() -> None:
    best, records, said = Best(), [], []
    for item in [record(0, 5, 5), record(1, 3, 4), record(2, 2, 4), record(3, 1.5, 4.1), record(4, 1, 4.2),
                 record(5, 0.5, 4.3)]:  # fmt: skip
        records.append(item)
        best.see(item)
        said += best.notices(records)
    assert best.step == 1 and len(said) == 1
    assert (
        "not improved since step 1 (4.0000 nats, now 4.2000)" in said[0]
        and "fell from 3.0000 to 1.0000" in said[0]
    )


def test_no_notice_where_training_does_not_go_on_either() -> None:
    best, records = Best(), []
    for step in range(8):
        records.append(record(step, 3 + step, 4 + step))
        best.see(records[-1])
        assert best.notices(records) == []

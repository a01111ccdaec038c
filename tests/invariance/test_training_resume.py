"""A run that was stopped, interrupted or damaged ends with the bits of one that was not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.training_runs import PLAN, assert_same_end, tiny_config, tiny_store

from twodice.errors import ConfigError, Interrupted
from twodice.text.store import TokenStore
from twodice.training.checkpoint import checkpoint_path, list_steps
from twodice.training.loop import train

SETTINGS: dict[str, Any] = {
    "steps": 7,
    "dropout": PLAN,
    "accumulate": 2,
    "evaluation": {"every": 3, "windows": 4},
    "checkpoint": {"every": 2},
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return tiny_store(tmp_path_factory.mktemp("resume") / "tokens")


@pytest.fixture(scope="module")
def whole(store: TokenStore, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(tiny_config(**SETTINGS), store, out)
    return out


class StopAfter:
    """Asks to stop at the n-th time that a loop looks."""

    def __init__(self, looks: int) -> None:
        self.left = looks

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


def test_two_runs_are_bit_identical(store: TokenStore, whole: Path, tmp_path: Path) -> None:
    train(tiny_config(**SETTINGS), store, tmp_path / "run")
    assert_same_end(whole, tmp_path / "run")


def test_a_run_stopped_at_every_look_ends_with_the_same_bits(
    store: TokenStore, whole: Path, tmp_path: Path
) -> None:
    """Stopped in turn inside evaluations, between micro-batches and between steps, again and again in one
    run."""
    out = tmp_path / "run"
    stops = 0
    for looks in [1, 4, 0, 8, 9, 7, 6, 5, 10, 3] * 3:
        try:
            train(tiny_config(**SETTINGS), store, out, stop=StopAfter(looks))
            break
        except Interrupted as error:
            stops += 1
            assert "the same command goes on from there" in str(error)
    else:
        pytest.fail("the run never ended")
    assert stops >= 5
    assert_same_end(whole, out)


def test_a_rate_that_follows_the_validation_loss_is_the_same_after_a_stop(
    store: TokenStore, tmp_path: Path
) -> None:
    """The learning rate is so small that no loss improves: the rate rises after each evaluation."""
    settings = {**SETTINGS, "dropout": "residual=plateau(0.1, 3.0, 1, 0.9)", "optimizer": {"lr": 1e-12}}
    train(tiny_config(**settings), store, tmp_path / "whole")
    out = tmp_path / "run"
    for looks in [9, 13, 17, 40]:
        try:
            train(tiny_config(**settings), store, out, stop=StopAfter(looks))
            break
        except Interrupted:
            pass
    assert_same_end(tmp_path / "whole", out)
    train(tiny_config(**{**settings, "dropout": "residual=0.1"}), store, tmp_path / "constant")

    def losses(folder: str) -> dict[int, float]:
        lines = (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return {r["step"]: r["loss_nats_per_token"] for r in records if r["kind"] == "train"}

    followed, constant = losses("whole"), losses("constant")
    assert [step for step in range(1, 8) if followed[step] != constant[step]] == [4, 5, 6, 7]


@pytest.mark.parametrize(
    "file", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    store: TokenStore, whole: Path, tmp_path: Path, file: str
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(tiny_config(**SETTINGS), store, out, stop=StopAfter(23))
    newest = list_steps(out / "checkpoints")[-1]
    path = checkpoint_path(out / "checkpoints", newest) / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    events: list[Mapping[str, Any]] = []
    train(tiny_config(**SETTINGS), store, out, on_event=events.append)
    said = [event["text"] for event in events if event["kind"] == "warning"]
    assert len(said) == 1 and file in said[0] and f"step-{newest:06d}" in said[0]
    assert next(event["step"] for event in events if event["kind"] == "resumed") < newest
    assert_same_end(whole, out)


def test_metrics_that_were_changed_are_not_gone_on_from(
    store: TokenStore, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(tiny_config(**SETTINGS), store, out, stop=StopAfter(23))
    metrics = out / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-30])
    events: list[Mapping[str, Any]] = []
    train(tiny_config(**SETTINGS), store, out, on_event=events.append)
    assert "metrics.jsonl does not hold its lines" in next(
        e["text"] for e in events if e["kind"] == "warning"
    )
    assert_same_end(whole, out)


def test_a_run_with_no_whole_checkpoint_begins_anew(store: TokenStore, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(tiny_config(**SETTINGS), store, out, stop=StopAfter(23))
    shutil.rmtree(out / "checkpoints")
    train(tiny_config(**SETTINGS), store, out)
    assert_same_end(whole, out)


def test_another_configuration_is_refused_and_the_difference_is_shown(store: TokenStore, whole: Path) -> None:
    changed = tiny_config(**{**SETTINGS, "steps": 9, "optimizer": {"lr": 0.5}})
    with pytest.raises(ConfigError, match=r"steps: 7 there, 9 here; optimizer\.lr: None there, 0\.5 here"):
        train(changed, store, whole)


def test_other_tokens_are_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trained on other tokens"):
        train(tiny_config(**SETTINGS), tiny_store(tmp_path / "tokens", documents=30), whole)


def test_a_finished_run_says_so_and_does_nothing(store: TokenStore, whole: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file() and p.name != ".lock"}
    events: list[Mapping[str, Any]] = []
    result = train(tiny_config(**SETTINGS), store, whole, on_event=events.append)
    assert [event["kind"] for event in events] == ["notice"] and "nothing to do" in events[0]["text"]
    assert result.steps == 7 and result.model == whole / "model"
    assert {p: p.stat().st_mtime_ns for p in whole.rglob("*") if p.is_file() and p.name != ".lock"} == before


def test_the_resolved_configuration_goes_on_too(store: TokenStore, whole: Path) -> None:
    from twodice.training.config import read_config

    events: list[Mapping[str, Any]] = []
    train(read_config(whole / "config.json"), store, whole, on_event=events.append)
    assert "nothing to do" in events[0]["text"]


def test_another_number_of_threads_goes_on_with_a_warning(store: TokenStore, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        train(tiny_config(**SETTINGS), store, out, stop=StopAfter(9))
    # As if the run had begun with three; to really use several is slow on a machine that has other work.
    record = json.loads((out / "run.json").read_text())
    assert record["threads"] == 1
    record["threads"] = record["requested"]["threads"] = 3
    (out / "run.json").write_text(json.dumps(record))
    events: list[Mapping[str, Any]] = []
    train(tiny_config(**SETTINGS), store, out, on_event=events.append, export=False)
    said = [e["text"] for e in events if e["kind"] == "warning"]
    assert len(said) == 1 and said[0].startswith("the run goes on with threads 3 there, 1 here")


def test_two_commands_in_one_folder_are_refused(store: TokenStore, tmp_path: Path) -> None:
    def second(event: Mapping[str, Any]) -> None:
        if event["kind"] == "train":
            with pytest.raises(ConfigError, match="another command is working in"):
                train(tiny_config(**SETTINGS), store, tmp_path / "run")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny_config(**SETTINGS), store, tmp_path / "run", on_event=second)


def test_no_state_of_a_generator_and_no_wall_clock_is_in_what_is_compared(whole: Path) -> None:
    for line in (whole / "metrics.jsonl").read_text().splitlines():
        assert not {"seconds", "time", "tokens_per_s"} & json.loads(line).keys()
    newest = checkpoint_path(whole / "checkpoints", 7)
    assert sorted(p.name for p in newest.iterdir()) == [
        "manifest.json", "optimizer.safetensors", "state.json", "weights.safetensors"
    ]  # fmt: skip
    assert set(json.loads((newest / "state.json").read_text())) == {
        "best_step",
        "metrics",
        "resumable",
        "step",
    }


def test_the_checkpoints_kept_are_step_0_the_last_and_the_best(store: TokenStore, tmp_path: Path) -> None:
    """A learning rate far too high makes the first steps the best ones."""
    settings = {**SETTINGS, "steps": 8, "optimizer": {"lr": 0.5, "warmup": 0, "schedule": "constant"}}
    result = train(tiny_config(**settings), store, tmp_path / "run")
    kept = list_steps(tmp_path / "run" / "checkpoints")
    assert result.best_step < 6 and set(kept) == {0, result.best_step, 6, 8}
    from safetensors.torch import load_file

    exported = load_file(tmp_path / "run" / "model" / "model.safetensors")
    best = load_file(
        checkpoint_path(tmp_path / "run" / "checkpoints", result.best_step) / "weights.safetensors"
    )
    assert all(torch.equal(exported[name], best[name]) for name in best)
    # The last one instead, from the same run.
    train(tiny_config(**settings), store, tmp_path / "run", final=True)
    exported = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert not all(torch.equal(exported[name], best[name]) for name in best)


def test_damaged_best_weights_are_named_and_the_best_whole_ones_exported(
    store: TokenStore, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    best = json.loads((out / "result.json").read_text())["best_step"]
    weights = out / "checkpoints" / f"step-{best:06d}" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    shutil.rmtree(out / "model")
    told: list[str] = []
    train(tiny_config(**SETTINGS), store, out, on_event=lambda event: told.append(str(event.get("text", ""))))
    assert any(f"weights of step {best} are lost" in text for text in told)
    assert (out / "model" / "model.safetensors").is_file()
    assert json.loads((out / "result.json").read_text())["exported_step"] != best

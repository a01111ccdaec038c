"""`twodice train` as people run it: from a text to a model's folder, stopped, killed, gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.training_runs import PLAN, assert_same_end

ROOT = Path(__file__).parents[2]
QUICK = [
    "python-docs", "--tokenizer", "bytes", "--context", "16", "--batch", "8", "--share", "0.1",
    "--threads", "1", "--set", "evaluation.windows=4",
]  # fmt: skip


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "twodice", "train", *words]


def run(*words: str, code: int = 0, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **settings}
    done = subprocess.run(command(*words), capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("trained") / "run"
    words = [*QUICK, "--steps", "8", "--dropout", PLAN, "--accumulate", "2", "--out", str(out), "--json"]
    return out, run(*words)


def test_the_run_says_every_setting_with_its_reason_and_ends_with_json(
    trained: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, done = trained
    result = json.loads(done.stdout)
    assert result["steps"] == 8 and result["model"] == str(out / "model")
    for words in ("8              given", "a tenth of lr", "0.95           default: decay of"):
        assert words in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_the_models_folder_loads_in_transformers_with_the_same_logits(
    trained: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    out, _ = trained
    model = AutoModelForCausalLM.from_pretrained(out / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    text = "the with statement, été\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    with torch.no_grad():
        logits = model(torch.tensor([ids[:16]])).logits
    assert bool(torch.isfinite(logits).all())
    assert json.loads((out / "result.json").read_text())["largest_logit_difference"] <= 1e-5
    # The weights are those of the best step, to the bit.
    from safetensors.torch import load_file

    step = json.loads((out / "result.json").read_text())["best_step"]
    weights = load_file(out / "checkpoints" / f"step-{step:06d}" / "weights.safetensors")
    exported = load_file(out / "model" / "model.safetensors")
    assert weights.keys() == exported.keys()
    assert all(torch.equal(weights[name], exported[name]) for name in weights)
    assert not [value for name, value in model.config.to_dict().items() if "pdrop" in name and value]

    written = json.loads((out / "model" / "generation_config.json").read_text())
    for name in ("do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "eos_token_id"):
        assert name in written
    assert written["top_k"] == 0 and written["temperature"] == 1.0
    loaded = GenerationConfig.from_pretrained(out / "model")
    assert loaded.top_k == 0 and loaded.eos_token_id == tokenizer.eos_token_id


def test_a_run_without_the_native_kernels_ends_with_the_same_bits(tmp_path: Path) -> None:
    # Not attention: its readable twin sums in another order.
    words = [*QUICK, "--steps", "3", "--dropout", "embedding=0.1, residual=0.2", "--set", "dtype=float32"]
    outs = [tmp_path / kernels for kernels in ("auto", "reference")]
    for out in outs:
        run(*words, "--out", str(out), TWODICE_KERNELS=out.name)
    assert_same_end(*outs)


def test_the_run_folder_holds_what_the_docs_say(
    trained: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, _ = trained
    names = {p.name for p in out.iterdir() if not p.name.startswith(".")}
    assert names == {
        "checkpoints", "config.json", "metrics.jsonl", "model", "result.json", "run.json", "timings.jsonl",
        "tokens",
    }  # fmt: skip
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    trains = [r for r in records if r["kind"] == "train"]
    assert [r["step"] for r in trains] == list(range(1, 9))
    assert set(trains[0]) == {"kind", "step", "loss_nats_per_token", "lr", "tokens"}
    evaluations = [r for r in records if r["kind"] == "evaluation"]
    assert evaluations[0]["step"] == 0 and evaluations[-1]["step"] == 8
    for split in ("train", "validation_a", "validation_b"):
        assert {f"{split}_nats_per_token", f"{split}_bits_per_byte"} <= evaluations[0].keys()
    assert (out / "checkpoints" / "step-000000").is_dir()
    # Before anything is learnt a byte is worth about 8 bits.
    assert evaluations[0]["validation_a_bits_per_byte"] == pytest.approx(8, abs=0.5)


def test_the_same_command_says_that_it_is_finished_and_another_one_is_refused(
    trained: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    out, _ = trained
    same = [*QUICK, "--steps", "8", "--dropout", PLAN, "--accumulate", "2", "--out", str(out)]
    assert "finished: nothing to do" in run(*same).stderr
    refused = run(*same, "--set", "lr=0.5", code=2)
    assert "optimizer.lr: None there, 0.5 here" in refused.stderr
    assert "Traceback" not in refused.stderr and len(refused.stderr.strip().splitlines()) <= 2


def test_plan_says_what_would_be_done_and_writes_nothing(tmp_path: Path) -> None:
    done = run(*QUICK, "--epochs", "2", "--out", str(tmp_path / "run"), "--plan", "--json")
    plan = json.loads(done.stdout)
    assert plan["steps"] == plan["config"]["steps"] and plan["epochs"] == pytest.approx(2, rel=0.1)
    assert plan["parameters"] == pytest.approx(8.3e5, rel=0.02)
    assert plan["seconds"] > 0 and plan["peak_bytes"] > plan["state_bytes"] > 4 * plan["parameters"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model", "gpt2-nan"], "did you mean 'gpt2-nano'"),
        (["--set", "optimizer.weight_decai=1"], "did you mean 'optimizer.weight_decay'"),
        (["--steps", "0"], "steps"),
        (["--steps", "3", "--epochs", "1"], "one of steps, epochs, minutes"),
        (["--dropout", "residual=1.5"], "1.5"),
        (["--batch", "6", "--accumulate", "4"], "multiple of accumulate"),
    ],
)
def test_what_cannot_be_meant_is_said_in_a_line_or_two(tmp_path: Path, words: list[str], said: str) -> None:
    done = run("python-docs", *words, "--out", str(tmp_path / "run"), code=2)
    assert said in done.stderr and len(done.stderr.strip().splitlines()) <= 2
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_saves_and_the_same_command_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    words = [*QUICK, "--steps", "60", "--out", str(tmp_path / "run"), "--set", "checkpoint.every=1000"]
    process = subprocess.Popen(command(*words), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    wait_for(tmp_path / "run" / "checkpoints" / "step-000000", process)
    time.sleep(0.3)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    assert "the same command goes on from there" in said
    if number == signal.SIGTERM:
        assert "going on from step" in run(*words).stderr


def test_the_second_signal_stops_at_once(tmp_path: Path) -> None:
    words = [*QUICK, "--steps", "100000", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(command(*words), stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    wait_for(tmp_path / "run" / "checkpoints" / "step-000000", process)
    # Frozen in between, so that both have come before the loop looks.
    process.send_signal(signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    process.communicate(timeout=30)
    assert process.returncode == 130


def wait_for(path: Path, process: subprocess.Popen[Any]) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def killed(folder: Path, kills: int) -> list[int]:
    """Steps of the newest checkpoint at each kill."""
    words = [sys.executable, "-m", "tests.support.killed_runs", str(folder), str(kills)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: list[int] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_run_killed_four_times_ends_bit_identical(tmp_path: Path) -> None:
    steps = killed(tmp_path, 4)
    assert len(steps) == 4 and max(steps) > 0, "a kill must fall after a checkpoint, or nothing is shown"
    assert_same_end(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_bit_identical(tmp_path: Path) -> None:
    steps = killed(tmp_path, 20)
    assert len(steps) == 20
    assert_same_end(tmp_path / "whole", tmp_path / "killed")

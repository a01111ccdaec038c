"""Whole small studies through the command line: answer, folder, equal arms, a kill, a stop."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from twodice.study.mechanisms.measures import FIELDS
from twodice.study.schema import read_report

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs signals as Unix has them")

TINY = """
data = ["{text}"]
model = "gpt2-nano"
tokenizer = "bytes"
context = 32
batch = 2
steps = {steps}
threads = 1
seeds = {seeds}
[evaluation]
windows = 4
[checkpoint]
every = 5
[sampling]
prompts = 2
prompt_tokens = 8
tokens = 16
top_k = [5]
temperature = [1.0]
[arms]
{arms}
"""


def write_spec(tmp_path: Path, arms: str, *, steps: int = 4, seeds: int = 2) -> Path:
    text = tmp_path / "text.txt"
    lines = [f"{i}: the quick brown fox number {i * i} jumps over {i % 7} lazy dogs\n\n" for i in range(120)]
    text.write_text("".join(lines), encoding="utf-8")
    path = tmp_path / "study.toml"
    path.write_text(TINY.format(text=text, steps=steps, seeds=seeds, arms=arms), encoding="utf-8")
    return path


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "twodice", *map(str, words)]


def run(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), capture_output=True, text=True, timeout=240, check=False)


def trials_of(out: Path) -> Counter[tuple[str, int]]:
    lines = (out / "records.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return Counter((r["arm"], r["seed"]) for r in records if r["kind"] == "trial")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    tmp_path = tmp_path_factory.mktemp("study")
    spec = write_spec(tmp_path, 'neither = ""\nsame = ""\ndropout = "residual=0.2; embedding=0.1"')
    done = run("study", "--spec", spec, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    return spec, tmp_path / "out", done.stdout


def test_a_study_answers_and_leaves_everything_in_its_folder(finished: tuple[Path, Path, str]) -> None:
    _, out, said = finished
    report = read_report(out / "report.json")
    assert report.answer in said and str(out / "report.html") in said
    assert (
        report.is_complete
        and report.steps == 4
        and [arm.name for arm in report.arms] == ["neither", "same", "dropout"]
    )
    assert set(trials_of(out).values()) == {1} and len(trials_of(out)) == 6
    assert (out / "report.html").is_file() and (out / "best" / "model.safetensors").is_file()
    assert report.cross is not None and report.cross.with_dropout == "dropout"
    assert {cell.setting.name for cell in report.sampling} == {"greedy", "top-k 5"}
    assert {example.arm for example in report.examples} >= {"neither", "dropout", "human"}
    assert report.sanity[0].name == "xz"
    # The losses compared are over all of validation text B, though an evaluation looks at 4 windows only.
    assert report.scored_on is not None and report.scored_on.windows == report.scored_on.there > 4
    assert "python" in report.how.machine


def test_two_equal_arms_cannot_be_told_apart(finished: tuple[Path, Path, str]) -> None:
    report = read_report(finished[1] / "report.json")
    same = report.arms[1]
    assert same.verdict == "cannot tell" and same.words == "cannot tell: no difference at all"
    assert same.at_best.difference is not None and set(same.at_best.difference.values) == {0.0}
    dropout = report.arms[2]
    assert dropout.at_end.difference is not None and 0.0 not in dropout.at_end.difference.values


def test_every_trial_is_measured_inside_and_equal_arms_alike(finished: tuple[Path, Path, str]) -> None:
    out = finished[1]
    lines = (out / "records.jsonl").read_text(encoding="utf-8").splitlines()
    trials = [r for r in map(json.loads, lines) if r["kind"] == "trial"]
    assert all(set(r["mechanisms"]) == set(FIELDS) for r in trials)
    block = read_report(out / "report.json").mechanisms
    assert block is not None and [row.measure for row in block.rows] == list(FIELDS)
    for row in block.rows:
        neither, same, dropout = row.arms
        if row.measure == "own_ensemble_gain":
            assert neither.value is same.value is None and dropout.value is not None
            continue
        assert same.difference is not None and dropout.difference is not None
        assert same.difference.mean == same.difference.low == same.difference.high == 0
        assert dropout.difference.mean != 0
    assert 'id="inside"' in (out / "report.html").read_text(encoding="utf-8")


def test_arms_that_differ_by_chance_alone_cannot_be_told_apart(tmp_path: Path) -> None:
    plan = "residual=0.3; embedding=0.3"
    spec = write_spec(tmp_path, f'first = "{plan}"\nagain = "{plan}; dropout_draw=1"', steps=6, seeds=3)
    done = run("study", "--spec", spec, "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "out" / "report.json")
    first, again = report.arms
    firsts = [arm.curve.validation_nats_per_token[0].values for arm in (first, again)]
    assert firsts[0] == firsts[1]  # the same weights and windows before the first mask
    for told in (again.at_best.difference, again.at_end.difference):
        assert told is not None and 0.0 not in told.values and len(set(told.values)) == 3
        assert told.low is not None and told.high is not None and told.low < 0 < told.high
    assert again.verdict == again.at_end.verdict == "cannot tell"
    assert report.best == "first" and report.answer.startswith("On this text we cannot tell whether any ")


def test_trials_of_one_seed_begin_alike(finished: tuple[Path, Path, str]) -> None:
    report = read_report(finished[1] / "report.json")
    firsts = [arm.curve.validation_nats_per_token[0].values for arm in report.arms]
    assert firsts[0] == firsts[1] == firsts[2] and len(set(firsts[0])) == 2


def test_report_makes_the_same_bytes_again_without_torch(finished: tuple[Path, Path, str]) -> None:
    out = finished[1]
    before = {name: (out / name).read_bytes() for name in ("report.json", "report.html")}
    for name in before:
        (out / name).unlink()
    # A torch that cannot be imported stands for a machine that has none.
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from twodice.cli.main import main\n"
        f"main(['report', {str(out)!r}])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {name: (out / name).read_bytes() for name in before} == before


def test_the_same_command_does_nothing_more_and_another_question_is_refused(
    finished: tuple[Path, Path, str],
) -> None:
    spec, out, _ = finished
    before = (out / "records.jsonl").read_bytes()
    other = run("study", "--spec", spec, "--out", out, "--seeds", "3")
    assert other.returncode == 2 and "seeds: 2 there, 3 here" in other.stderr
    assert len(other.stderr.strip().splitlines()) <= 2
    assert (out / "records.jsonl").read_bytes() == before


def test_texts_that_old_records_lack_are_generated_by_the_same_command(
    finished: tuple[Path, Path, str], tmp_path: Path
) -> None:
    spec, whole, _ = finished
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    lines = (out / "records.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line).get("arm") != "dropout" or '"kind": "trial"' in line]
    (out / "records.jsonl").write_text("".join(kept), encoding="utf-8")
    told = run("report", out)
    assert told.returncode == 0, told.stderr
    assert any("'dropout' are missing" in text for text in read_report(out / "report.json").details)
    done = run("study", "--spec", spec, "--out", out)
    assert done.returncode == 0, done.stderr
    again, before = (read_report(folder / "report.json") for folder in (out, whole))
    assert again.sampling == before.sampling and again.details == before.details


def wait_for(what: object, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what():  # type: ignore[operator]
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children_of(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        found += [int(child) for child in task.read_text().split()]
    return found


def test_a_study_killed_and_then_stopped_goes_on_and_loses_or_doubles_no_trial(tmp_path: Path) -> None:
    spec = write_spec(tmp_path, 'neither = ""\ndropout = "residual=0.2"', steps=70)
    out = tmp_path / "out"
    words = command("study", "--spec", spec, "--out", out)
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        wait_for(lambda: len(list(out.glob("trials/*/*/checkpoints/step-*"))) >= 3)
        workers = children_of(process.pid)
        process.kill()
        process.wait()
        if Path("/proc").is_dir():
            wait_for(lambda: not any(alive(pid) for pid in workers), 10)
        done_before = set(trials_of(out)) if (out / "records.jsonl").exists() else set()

        process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        wait_for(lambda: len(set(trials_of(out)) - done_before) >= 1)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == 75, (tmp_path / "log").read_text()
    done = run("study", "--spec", spec, "--out", out)
    assert done.returncode == 0, done.stderr
    assert trials_of(out) == Counter({(arm, seed): 1 for arm in ("neither", "dropout") for seed in (0, 1)})
    whole = tmp_path / "whole"
    assert run("study", "--spec", spec, "--out", whole).returncode == 0
    ours, theirs = (read_report(folder / "report.json") for folder in (out, whole))
    assert ours.arms == theirs.arms and ours.sampling == theirs.sampling


@pytest.mark.slow
def test_the_demo_shows_overfitting(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = subprocess.run(
        command("study", "--preset", "demo", "--out", out),
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = read_report(out / "report.json")
    neither = next(arm for arm in report.arms if arm.name == "neither")
    assert neither.overfits_percent >= 3
    assert neither.at_end.gap_nats_per_token.mean >= 0.3
    assert report.how.case is not None and len(report.arms) == 4 and report.seeds == [0, 1, 2, 3, 4]

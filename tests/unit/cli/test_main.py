"""The entry point: commands, wrong names, exit codes, and errors without a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from twodice.cli import main as entry
from twodice.cli.console import Progress, duration, errors_in_one_line
from twodice.errors import CheckpointError, ConfigError, Interrupted, nearest


def run(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "twodice", *words], capture_output=True, text=True, **options
    )


def test_help_names_every_command_and_exits_zero() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert all(name in done.stdout for name in entry.COMMANDS)


def test_each_command_answers_help() -> None:
    for name in entry.COMMANDS:
        done = run(name, "--help", env={**os.environ, "COLUMNS": "100"})
        assert done.returncode == 0, done.stderr
        assert "Usage" in done.stdout and "\x1b" not in done.stdout


def test_no_command_is_a_usage_error_that_shows_the_help() -> None:
    done = run()
    assert done.returncode == 2 and "usage: twodice COMMAND" in done.stdout


def test_a_wrong_command_names_the_nearest_one() -> None:
    done = run("stdy")
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: no command 'stdy'; did you mean 'study'? (twodice --help lists them)"
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("doctor --jsn", "no such option: --jsn"),
        ("doctor extra", "got unexpected extra argument(s) (extra)"),
        ("train --steps abc", "--steps must be an integer; got 'abc'"),
        ("study --minutes soon", "--minutes must be a number; got 'soon'"),
        ("audit gpt2-nano --steps 0", "--steps must be at least 1; got '0'"),
        ("report", "missing argument 'DIR'"),
    ],
)
def test_words_that_cannot_be_meant_are_a_usage_error_in_one_line(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        entry.main(words.split())
    shown = capsys.readouterr()
    assert stopped.value.code == 2 and shown.out == ""
    assert shown.err.startswith(f"error: {said}") and shown.err.count("\n") == 1


@pytest.mark.parametrize("name", ["train", "study"])
def test_a_file_is_no_folder_to_work_in(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as stopped:
        entry.main([name, "python-docs", "--out", str(tmp_path / "file")])
    assert stopped.value.code == 2
    assert (
        capsys.readouterr().err
        == f"error: --out must be a folder, new or old; '{tmp_path / 'file'}' is a file\n"
    )


@pytest.mark.parametrize("name", ["train", "generate"])
def test_a_device_that_is_not_here_is_said_before_any_work(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = {"train": ["--out", str(tmp_path)], "generate": [str(tmp_path), "--prompt", "a"]}[name]
    with pytest.raises(SystemExit) as stopped:
        entry.main([name, *words, "--device", "qpu"])
    assert stopped.value.code == 2
    assert (
        capsys.readouterr().err
        == "error: device must be auto, cpu, cuda, cuda:1, mps or the like; got 'qpu'\n"
    )


def test_doctor_says_which_kernels_are_in_use_and_why() -> None:
    found = json.loads(run("doctor", "--json").stdout)
    assert found["kernels"] in ("native", "reference") and found["why"] and found["cores"] >= 1
    forced = json.loads(run("doctor", "--json", env={**os.environ, "TWODICE_KERNELS": "reference"}).stdout)
    assert forced["kernels"] == "reference" and "TWODICE_KERNELS" in forced["why"]
    assert forced["gpu_kernels"].startswith("readable twins") and found["gpu_kernels"]


@pytest.mark.parametrize(
    ("error", "code"),
    [(ConfigError("p"), 2), (CheckpointError("c"), 1), (Interrupted("saved"), 75), (KeyboardInterrupt(), 130),
     (ZeroDivisionError("z"), 1), (FileNotFoundError(2, "No such file", "x"), 1)],
)  # fmt: skip
def test_each_error_has_its_exit_code_and_no_traceback(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught, errors_in_one_line(debug=False):
        raise error
    assert caught.value.code == code
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ConfigError), errors_in_one_line(debug=True):
        raise ConfigError("p")


def test_a_closed_pipe_is_not_an_error_that_shows_a_traceback() -> None:
    done = subprocess.run(
        f"{sys.executable} -m twodice doctor --json | head -c 1", shell=True, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr


def test_a_terminal_that_cannot_show_a_character_gets_a_question_mark(tmp_path: Path) -> None:
    done = run("report", str(tmp_path / "−"), env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2 and "/? must hold a study" in done.stderr


def test_progress_off_a_terminal_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("training", 4, plain_every_s=0.0) as progress:
        for done in range(1, 5):
            progress.update(done, f"loss {done}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("training: 1/4  loss 1") and "left" in lines[0] and len(lines) == 4
    assert "\x1b" not in "".join(lines)


def test_durations_are_read_by_people() -> None:
    assert [duration(s) for s in (0, 59, 60, 75, 3600, 5430)] == [
        "0 s", "59 s", "1 min", "1 min 15 s", "1 h 0 min", "1 h 30 min"
    ]  # fmt: skip


def test_the_nearest_name_is_offered_only_when_it_is_near() -> None:
    assert nearest("residul", ["residual", "attention"]) == "; did you mean 'residual'?"
    assert nearest("zzz", ["residual"]) == ""

"""`twodice conformance` as it is called: what it prints, its exit codes, bad input, and Ctrl-C."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from twodice.cli.main import main

BROKEN = "tests.support.broken_samplers"


def called(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(["conformance", *words])
    told = capsys.readouterr()
    return int(caught.value.code or 0), told.out, told.err


def test_a_right_sampler_exits_zero_and_says_how_sure_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = called(capsys, "--rows", "top-k,place", "--draws", "2000", "--cells")
    lines = out.splitlines()
    assert code == 0 and lines[0] == "twodice draws as it claims: none of 4 cells rejects"
    assert any(line.startswith("  ok       top-k: no draw outside the 10 kept") for line in lines)
    assert lines[-1] == "a right sampler is rejected with probability at most 1e-06"


@pytest.mark.parametrize(
    ("file", "told"),
    [(".", "got ., which is a folder"), ("/dev/full", "can be written; /dev/full: No space left")],
)
def test_a_page_that_cannot_be_written_is_not_the_exit_code_of_a_rejected_sampler(
    capsys: pytest.CaptureFixture[str], file: str, told: str
) -> None:
    code, _, err = called(capsys, "--rows", "greedy", "--draws", "2000", "--html", file)
    assert code == 2 and told in err and "Traceback" not in err


def test_a_broken_sampler_exits_one_and_says_where(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "verdict.html"
    code, out, err = called(
        capsys, "--sampler", f"{BROKEN}:k_one_more", "--rows", "top-k", "--rows", "plain", "--draws", "5000",
        "--html", str(file),
    )  # fmt: skip
    assert code == 1 and out.startswith(f"{BROKEN}:k_one_more does not draw as it claims: kept set\n")
    assert "  rejected top-k: " in out and f"wrote {file}" in err
    assert "does not draw as it claims: kept set" in file.read_text("utf-8")


def test_json_holds_every_cell_and_what_it_would_have_found(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = called(capsys, "--rows", "hill", "--offers", "none", "--draws", "2000", "--json")
    found = json.loads(out)
    assert code == 0 and found["verdict"] == "accepted" and found["alpha"] == 1e-6
    assert {cell["kind"] for cell in found["cells"]} == {"body", "tail"}
    assert all(cell["catches"] and 0 <= cell["p"] <= cell["adjusted"] <= 1 for cell in found["cells"])


def test_rules_of_another_engine_can_be_claimed(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--sampler", f"{BROKEN}:ties_kept", "--rows", "tie-at-k", "--draws", "2000")
    assert called(capsys, *words)[0] == 1
    assert called(capsys, *words, "--ties", "kept")[0] == 0


def test_a_sampler_that_offers_nothing_of_what_was_asked_is_not_accepted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, out, _ = called(capsys, "--offers", "none", "--rows", "place,seeds")
    assert code == 2 and "nothing was judged" in out
    assert "place: not offered, the sampler does not offer seeds" in out


@pytest.mark.parametrize(
    "words",
    [
        ("--sampler", "nowhere:f"),
        ("--sampler", "json:dumps"),
        ("--draws", "5"),
        ("--rows", "top"),
        ("--ties", "some"),
        ("--offers", "seed"),
        ("--html", "no/such/folder/x.html"),
        ("--html", "."),
        ("--sampler", "torch:argmax", "--rows", "plain"),
    ],
)
def test_bad_input_is_one_or_two_lines_and_exit_code_two(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    code, out, err = called(capsys, *words)
    assert code == 2 and out == "" and "Traceback" not in err
    assert sum(line.startswith("error: ") for line in err.splitlines()) == 1


def test_a_sampler_that_ends_the_process_is_no_verdict(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A script without a guard ends by sys.exit(0) when it is imported; that is not "as it claims"."""
    (tmp_path / "unguarded.py").write_text("def draw(logits, rows):\n    raise SystemExit(0)\n")
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, words in (("unguarded", "raised SystemExit at 'plain': 0"), ("script", "gave SystemExit: 0")):
        code, out, err = called(capsys, "--sampler", f"{name}:draw", "--rows", "plain")
        assert code == 2 and out == "" and words in err


def test_a_page_that_cannot_be_written_takes_no_verdict_away(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    words = ("--rows", "top-k", "--draws", "2000", "--html", str(tmp_path / "x.html"))
    code, out, err = called(capsys, *words)
    assert code == 2 and out.startswith("twodice draws as it claims") and "No space left" in err


def test_ctrl_c_stops_without_a_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support import broken_samplers

    def interrupted(logits: object, rows: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(broken_samplers, "interrupted", interrupted, raising=False)
    code, out, err = called(capsys, "--sampler", f"{BROKEN}:interrupted", "--rows", "plain")
    assert code == 130 and out == "" and err.splitlines()[-1] == "stopped at once"

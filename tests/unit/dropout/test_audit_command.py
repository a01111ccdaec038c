"""`twodice audit`: presets and folders, a table and JSON, errors in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.tiny_models import tiny_model

from twodice.cli.main import main


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[object, str, str]:
    with pytest.raises(SystemExit) as done:
        main(["audit", *words])
    printed = capsys.readouterr()
    return done.value.code, printed.out, printed.err


def test_a_preset_is_listed_with_what_the_plan_does(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, "llama-nano", "--plan", "residual.mlp[0:2]=early(0.1, 0.3)", "--steps", "10", "--json"
    )
    sites = json.loads(out)["sites"]
    assert not code
    assert [s["site"] for s in sites if s["live"]] == [
        "model.layers.0.mlp#residual",
        "model.layers.1.mlp#residual",
    ]
    free = [s["kind"] for s in sites if s["source"] == "free"]
    assert (free.count("residual"), free.count("attention"), free.count("embedding")) == (6, 4, 1)


def test_a_folder_is_listed_as_a_table_without_its_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model(resid_pdrop=0.1).config.save_pretrained(tmp_path)
    code, out, _ = run(capsys, str(tmp_path))
    assert not code and "plan: none" in out
    own = next(line for line in out.splitlines() if line.startswith("transformer.h.0.mlp.dropout "))
    assert " yes " in own and "torch's generator" in own
    assert "transformer#embedding" in out


def test_an_unknown_model_is_said_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "lama-nano")
    assert code in (1, 2) and "did you mean 'llama-nano'" in err and "Traceback" not in err


def test_a_plan_without_its_length_is_said_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "gpt2-nano", "--plan", "residual=early(0.1, 0.3)")
    assert code in (1, 2) and "total_steps" in err

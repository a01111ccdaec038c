"""`twodice generate` on real folders: text to stdout, the rest to stderr, and the same output again."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.unit.generation.conftest import byte_tokenizer, tiny_gpt2

from twodice.cli.main import main
from twodice.sampling.fields import FIELDS


def save(folder: Path, **written: Any) -> Path:
    tiny_gpt2().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(written))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out as a run: the model is in ``model``."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "checkpoints").mkdir()
    save(folder / "model", do_sample=True, temperature=0.9, top_k=40, top_p=1.0)
    return folder


class Said:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*words: Any) -> Said:
        with pytest.raises(SystemExit) as stopped:
            main(["generate", *map(str, words)])
        out, err = capsys.readouterr()
        return Said(stopped.value.code or 0, out, err)  # type: ignore[arg-type]

    return call


def again(err: str) -> list[str]:
    """The words of the command that was said to give the same output again."""
    words = shlex.split(err[err.index("again: ") + len("again: ") :])
    assert words[:2] == ["twodice", "generate"]
    return words[2:]


def test_the_command_that_is_said_gives_the_same_output_again(run: Path, say: Any) -> None:
    first = say(
        run, "--prompt", 'it\'s "so"\nwörld', "--max-tokens", 12, "-n", 3, "--top-p", 0.9, "--stop", "zz"
    )
    assert first.code == 0 and "seed: " in first.err
    assert [line for line in first.out.splitlines() if line.startswith("---")] == [
        f"--- {i} of 3" for i in (1, 2, 3)
    ]
    second = say(*again(first.err))
    assert second.out == first.out and again(second.err) == again(first.err)
    assert say(run, "--prompt", 'it\'s "so"\nwörld', "--max-tokens", 12).out != first.out


def test_where_each_setting_came_from_is_said(run: Path, say: Any) -> None:
    said = say(run, "--prompt", "a", "--max-tokens", 2, "--top-k", 7)
    assert (
        "temperature 0.9 (generation_config.json), top_k 7 (--top-k), top_p off (generation_config.json)"
        in said.err
    )
    assert "min_p off (neutral)" in said.err


def test_json_holds_the_text_its_tokens_and_why_each(run: Path, say: Any) -> None:
    plain = say(run, "--prompt", "ab", "--max-tokens", 6, "-n", 2, "--seed", 7)
    said = json.loads(
        say(run, "--prompt", "ab", "--max-tokens", 6, "-n", 2, "--seed", 7, "--json", "--explain").out
    )
    assert plain.out == "".join(
        f"--- {i + 1} of 2\n{one['text']}\n" for i, one in enumerate(said["completions"])
    )
    assert said["seed"] == 7 and said["prompt_tokens"] == 2
    assert said["settings"]["top_k"] == {"value": 40, "from": "generation_config.json"}
    for one in said["completions"]:
        assert len(one["tokens"]) == len(one["logprobs"]) == len(one["explain"])
        assert [record["token"] for record in one["explain"]] == one["tokens"]
        assert one["explain"][0]["stages"][0]["kept"] == 40


def test_explain_prints_a_line_for_each_token_when_piped(run: Path, say: Any) -> None:
    said = say(run, "--prompt", "a", "--max-tokens", 5, "--seed", 1, "--explain")
    lines = [line for line in said.out.splitlines() if "left top_k=40: 40" in line and "believed" in line]
    assert len(lines) == 5


EVERY = shlex.split(
    """--temp 0.8 --dynatemp-range 0.2 --dynatemp-exponent 2 --top-n-sigma 4 --top-k 90 --top-p 0.99
    --min-p 1e-6 --top-h 0.99 --typical-p 0.99 --epsilon-cutoff 1e-6 --eta-cutoff 1e-6
    --xtc-probability 0.5 --xtc-threshold 0.2 --mirostat-tau 5 --mirostat-eta 0.2
    --repetition-penalty 1.1 --presence-penalty 0.1 --frequency-penalty -0.1 --penalty-range 9
    --no-repeat-ngram-size 3 --dry-multiplier 0.8 --dry-base 1.5 --dry-allowed-length 3
    --dry-range 50 --dry-breakers 10,13 --logit-bias 65=1.5,66=-inf --banned-tokens 67 --min-tokens 2
    --stop-tokens 256 --order
    min_p,temperature,top_n_sigma,top_k,top_p,top_h,typical_p,epsilon_cutoff,eta_cutoff,xtc,mirostat"""
)
EVERY += ["--allowed-tokens", ",".join(map(str, range(200)))]


def test_every_setting_can_be_typed_and_comes_back_in_the_command(run: Path, say: Any) -> None:
    missing = {"--" + name.replace("_", "-") for name in FIELDS} - set(EVERY)
    assert missing == {"--temperature", "--xtc-by-expectation", "--profile", "--seed"}
    first = say(run, "--prompt", "abcab", "--max-tokens", 8, "-n", 2, "--json", "--explain", *EVERY)
    assert first.code == 0, first.err
    told = json.loads(first.out)
    assert told["settings"]["mirostat_tau"] == {"value": 5.0, "from": "--mirostat-tau"}
    states = [record["state"] for record in told["completions"][0]["explain"]]
    assert states[0]["before"] is None
    assert [s["before"] for s in states[1:]] == [s["after"] for s in states[:-1]]
    second = say(*again(first.err))
    assert second.out == "".join(
        f"--- {i + 1} of 2\n{one['text']}\n" for i, one in enumerate(told["completions"])
    )
    engine = say(run, "--prompt", "a", "--profile", "llama.cpp", "--xtc-probability", 0.5, "--max-tokens", 3)
    assert "profile llama.cpp (--profile)" in engine.err
    assert say(*again(engine.err)).out == engine.out


def test_explain_says_what_each_edit_moved_also_on_a_terminal(
    run: Path, say: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (run, "--prompt", "ab", "--max-tokens", 3, "--seed", 1, "--explain", "--repetition-penalty", 1.5,
             "--banned-tokens", "97", "--logit-bias", "5=2")  # fmt: skip
    piped = say(*words)
    first = next(line for line in piped.out.splitlines() if "believed" in line)
    assert '; moved logit_bias: 1 ids: "\\u0005" +2  banned_tokens' in first
    assert "banned_tokens: 1 ids: 1 banned  repetition_penalty=1.5: " in first
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    assert "moved by each edit" in say(*words).out
    assert "moved by each edit" not in say(run, "--prompt", "a", "--max-tokens", 2, "--explain").out


def test_greedy_is_the_other_pole(run: Path, say: Any) -> None:
    first, second = (say(run, "--prompt", "a", "--greedy", "--max-tokens", 9) for _ in range(2))
    assert first.out == second.out and "no draw was used" in first.err and "seed:" not in first.err
    assert say(*again(first.err)).out == first.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "a", "--greedy", "--temperature", 0.7], "--temperature would do nothing"),
        (["--prompt", "a", "--greedy", "--top-k", 5], "--top-k would do nothing"),
        (["--prompt", "a", "--greedy", "--seed", 5], "--seed would do nothing"),
        (["--prompt", "a", "--temperature", 0, "--min-p", 0.1], "--min-p would do nothing"),
        (["--prompt", "a", "--greedy", "-n", 2], "gives one text only; got -n 2"),
        (["--prompt", "a", "--top-p", 1.5], "top_p must be in [0, 1]; got 1.5"),
        (["--prompt", "a", "--logit-bias", "5:1"], "--logit-bias must be ID=NUMBER,ID=NUMBER; got '5:1'"),
        (["--prompt", "a", "--banned-tokens", "x"], "--banned-tokens must be ID,ID; got 'x'"),
        (["--prompt", "a", "--order", "topk"], "did you mean 'top_k'"),
        (["--prompt", "a", "--profile", "vlm"], "did you mean 'vllm'"),
        (["--prompt", "a", "--max-tokens", 0], "max_tokens must be an integer of at least 1"),
        (["--prompt", "a", "--threads", 0], "--threads must be at least 1"),
        (["--prompt", "a", "--stop", ""], "at least one character"),
        ([], "got neither"),
        (["--prompt", "a", "--prompt-file", "b"], "got both"),
        (["--prompt-file", "no such file"], "'no such file': No such file"),
        (["--prompt", "x" * 64], "room for one token in the model's context of 64"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error_in_one_line(
    run: Path, say: Any, words: list[Any], message: str
) -> None:
    said = say(run, *words)
    assert said.code == 2 and said.out == ""
    assert message in said.err.splitlines()[-1] and "Traceback" not in said.err


def test_a_missing_folder_is_not_looked_up_on_the_hub(tmp_path: Path, say: Any) -> None:
    said = say(tmp_path / "none", "--prompt", "a")
    assert said.code == 2 and "does not exist" in said.err and "hf:" in said.err
    (tmp_path / "file").write_text("")
    said = say(tmp_path / "file", "--prompt", "a")
    assert said.code == 2 and "is a file" in said.err
    (tmp_path / "study" / "best").mkdir(parents=True)
    assert say(tmp_path / "study", "--prompt", "a").code == 2
    (tmp_path / "study" / "best" / "config.json").write_text("{}")
    assert "best model is in " in say(tmp_path / "study", "--prompt", "a").err
    assert "has no model yet" in say(_unfinished(tmp_path), "--prompt", "a").err


def _unfinished(tmp_path: Path) -> Path:
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    return tmp_path / "unfinished"


def test_weights_that_may_run_code_are_refused(tmp_path: Path, say: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    said = say(tmp_path, "--prompt", "a")
    assert said.code == 1 and "safetensors only; got pytorch_model.bin" in said.err


def test_a_folder_that_asks_for_greedy_is_overruled_by_what_needs_a_draw(tmp_path: Path, say: Any) -> None:
    folder = save(tmp_path / "m", do_sample=False)
    plain = say(folder, "--prompt", "a", "--max-tokens", 3)
    assert "do_sample is not true" in plain.err and "no draw was used" in plain.err
    assert "seed: 4" in say(folder, "--prompt", "a", "--max-tokens", 3, "--seed", 4).err


def test_a_prompt_comes_from_a_file_or_stdin_as_it_is(run: Path, tmp_path: Path, say: Any) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes("wörld\r\n".encode())
    given = say(run, "--prompt", "wörld\r\n", "--seed", 3, "--max-tokens", 8)
    assert say(run, "--prompt-file", path, "--seed", 3, "--max-tokens", 8).out == given.out
    path.write_bytes(b"abc\xff")
    broken = say(run, "--prompt-file", path)
    assert broken.code == 2 and "UTF-8" in broken.err and "at byte 3" in broken.err


def test_a_process_of_its_own_streams_utf8_and_reads_stdin(run: Path) -> None:
    words = [
        sys.executable,
        "-m",
        "twodice",
        "generate",
        run,
        "--prompt-file",
        "-",
        "--seed",
        "3",
        "--max-tokens",
        "8",
    ]
    done = subprocess.run(
        [str(word) for word in words], input="wörld".encode(), capture_output=True, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}, timeout=120,
    )  # fmt: skip
    text = done.stdout.decode("utf-8")
    assert text.endswith("\n") and text.strip()
    assert b"Loading" not in done.stderr and len(done.stderr.splitlines()) == 3

"""The README and the docs say what is there: blocks run, commands exist, links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from twodice.cli.main import COMMANDS
from twodice.dropout.plan import KINDS
from twodice.dropout.schedules import SCHEDULES
from twodice.kernels.noise_form import WORDS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")


def blocks(page: Path, language: str) -> list[str]:
    return [body for lang, body in BLOCK.findall(page.read_text("utf-8")) if lang == language]


@pytest.mark.parametrize("page", ["README.md", "docs/dropout.md", "docs/training.md"])
def test_every_python_block_of_a_page_runs(page: str, tmp_path: Path) -> None:
    code = "\n".join(blocks(ROOT / page, "python"))
    assert code, "the page shows code"
    path = tmp_path / "blocks.py"
    path.write_text(code, "utf-8")
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{code}\n{done.stderr}"


def test_the_page_on_dropout_speaks_of_every_kind_noise_and_schedule() -> None:
    text = (ROOT / "docs" / "dropout.md").read_text("utf-8")
    assert [word for word in (*KINDS, *WORDS, *SCHEDULES) if f"`{word}`" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files_that_are_there(page: Path) -> None:
    targets = [
        t for t in LINK.findall(page.read_text("utf-8")) if not t.startswith(("http:", "https:", "mailto:"))
    ]
    assert [t for t in targets if not (page.parent / t).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_in_the_docs_exist_with_their_options(page: Path) -> None:
    helps: dict[str, str] = {}
    for body in blocks(page, "sh") + blocks(page, "bash") + blocks(page, "console"):
        for line in re.sub(r"\\\n\s*", " ", body).splitlines():
            match = re.match(r"(?:\$ )?twodice (\w+)(.*)", line)
            if not match:
                continue
            name, rest = match.groups()
            assert name in COMMANDS, line
            if name not in helps:
                helps[name] = subprocess.run(
                    [sys.executable, "-m", "twodice", name, "--help"],
                    capture_output=True,
                    text=True,
                    check=True,
                    env={**__import__("os").environ, "COLUMNS": "200"},
                ).stdout
            for option in re.findall(
                r"(?<=\s)--[a-z][a-z-]*", re.sub(r"(['\"]).*?\1", "", rest.split("#")[0])
            ):
                assert option in helps[name], f"{option} in: {line}"


def test_make_targets_named_in_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in set(re.findall(r"make ([a-z-]+)", " ".join(blocks(ROOT / "README.md", "sh")))):
        assert f"\n{target}:" in makefile, target

"""The house is held by machine: imports go down the floors only, and the law is not broken in the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import twodice

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "twodice"
FLOORS = {
    "random": 0,
    "kernels": 1,
    "dropout": 2,
    "sampling": 2,
    "nn.py": 3,
    "text": 3,
    "training": 4,
    "generation": 4,
    "study": 5,
    "serving": 5,
    "cli": 6,
}
# Training does not see generation, the wings do not see each other: same floor means strangers.
ABOVE_ALL = {"__main__.py"}
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

BANNED_CALLS = {
    "torch.rand",
    "torch.randn",
    "torch.randint",
    "torch.randperm",
    "torch.rand_like",
    "torch.randn_like",
    "torch.multinomial",
    "torch.bernoulli",
    "torch.manual_seed",
    "torch.dropout",
    "torch.normal",
    "torch.load",
    "torch.save",
    "nn.Dropout",
    "torch.nn.Dropout",
    "F.dropout",
    "torch.nn.functional.dropout",
    "nn.functional.dropout",
}
BANNED_METHODS = {"bernoulli_", "exponential_", "uniform_", "normal_", "random_"}
BANNED_MODULES = {"random", "pickle", "numpy.random"}
MAY_SEED = SOURCE / "training" / "init.py"
BANNED_FILE_NAMES = {"utils", "helpers", "common", "misc", "base"}


def imported_names(tree: ast.AST) -> list[str]:
    """Every module named by an import anywhere in `tree`, also inside functions."""
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.append(node.module or "")
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def breaches(path: Path, tree: ast.AST) -> list[str]:
    """Imports of `path` that go up or sideways. The files beside the folders are above all, but for `nn`."""
    own = path.relative_to(SOURCE).parts[0]
    if own not in FLOORS:
        return []
    found = []
    for name in imported_names(tree):
        pieces = name.split(".")
        if pieces[0] != "twodice" or len(pieces) < 2:
            continue
        other = pieces[1] if pieces[1] in FLOORS else f"{pieces[1]}.py"
        if other in FLOORS and other != own and FLOORS[other] >= FLOORS[own]:
            found.append(f"{path.relative_to(SOURCE)} imports {name}")
    return found


def dotted(node: ast.expr) -> str:
    """``a.b.c`` for an attribute chain, else an empty string."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def offences(tree: ast.AST) -> list[str]:
    """Calls and imports of generators with hidden state, and of pickle."""
    found = [name for name in imported_names(tree) if name in BANNED_MODULES]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        if name in BANNED_CALLS or name.startswith(("np.random.", "numpy.random.")):
            found.append(name)
        if isinstance(node.func, ast.Attribute) and node.func.attr in BANNED_METHODS:
            found.append(node.func.attr)
        found += [
            "scaled_dot_product_attention(dropout_p=...)"
            for keyword in node.keywords
            if keyword.arg == "dropout_p"
            and not (isinstance(keyword.value, ast.Constant) and keyword.value.value == 0)
        ]
    return found


def test_every_folder_of_the_source_has_a_floor() -> None:
    folders = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders <= set(FLOORS)


def test_imports_go_down_the_floors_only() -> None:
    assert [b for path, tree in TREES.items() for b in breaches(path, tree)] == []


def test_an_import_that_goes_up_would_be_found() -> None:
    bad = ast.parse("def f():\n    from twodice.sampling.params import SamplingParams\n")
    assert breaches(SOURCE / "dropout" / "x.py", bad)
    assert breaches(SOURCE / "kernels" / "x.py", ast.parse("import twodice.study.run"))
    assert breaches(SOURCE / "nn.py", ast.parse("import twodice.training.loop"))
    assert breaches(SOURCE / "dropout" / "x.py", ast.parse("from twodice.nn import Step"))


def test_no_hidden_generator_and_no_pickle_in_the_source() -> None:
    found = {str(p.relative_to(SOURCE)): offences(t) for p, t in TREES.items() if p != MAY_SEED}
    assert {name: bad for name, bad in found.items() if bad} == {}


def test_a_hidden_generator_would_be_found() -> None:
    for line in (
        "import random",
        "torch.rand(3)",
        "x.uniform_()",
        "nn.Dropout(0.1)",
        "np.random.default_rng(0)",
        "f(q, k, v, dropout_p=p)",
        "from torch import load\nimport pickle",
    ):
        assert offences(ast.parse(line)), line


def test_every_module_says_what_it_holds() -> None:
    assert [str(p) for p, t in TREES.items() if not ast.get_docstring(t)] == []


def test_no_file_is_a_drawer_for_everything() -> None:
    assert [str(p) for p in FILES if p.stem in BANNED_FILE_NAMES] == []


def test_no_file_is_longer_than_six_hundred_lines() -> None:
    assert {str(p): n for p in FILES if (n := len(p.read_text("utf-8").splitlines())) > 600} == {}


def test_public_functions_and_classes_have_docstrings() -> None:
    bare = []
    for path, tree in TREES.items():
        for node in tree.body if isinstance(tree, ast.Module) else []:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                if not ast.get_docstring(node):
                    bare.append(f"{path.relative_to(SOURCE)}:{node.name}")
    assert bare == []


def test_nothing_tracked_is_large_or_built() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    names = [n for n in listed.stdout.decode().split("\0") if n and (ROOT / n).exists()]
    assert [n for n in names if (ROOT / n).stat().st_size > 400_000] == []
    assert [n for n in names if n.endswith((".so", ".pyc", ".safetensors", ".whl"))] == []


def modules_after(code: str) -> set[str]:
    """Top-level modules loaded by a fresh interpreter that ran `code`."""
    script = f"{code}\nimport sys; print(*sorted({{m.split('.')[0] for m in sys.modules}}), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


def test_import_and_help_load_neither_torch_nor_transformers() -> None:
    heavy = {"torch", "transformers", "numpy", "scipy", "matplotlib"}
    assert not modules_after("import twodice") & heavy
    code = "from twodice.cli.main import main\ntry:\n    main(['--help'])\nexcept SystemExit: pass"
    assert not modules_after(code) & heavy


def test_public_names_load_torch_but_not_transformers() -> None:
    """But for the two that are classes of transformers."""
    names = [name for name in twodice.__all__ if name not in ("DropoutCallback", "processor")]
    loaded = modules_after(f"import twodice\nfor n in {names!r}: getattr(twodice, n)")
    assert "torch" in loaded and "transformers" not in loaded

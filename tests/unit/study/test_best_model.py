"""``best/`` is the old model or the new one, whenever its change is cut short."""

from __future__ import annotations

from pathlib import Path

import pytest

from twodice.study.best import put_best, take_back


def model(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text(text)
    return folder


def held(out: Path) -> str:
    return (out / "best" / "model.safetensors").read_text()


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_best_is_old_or_new_after_any_rename_that_fails(
    cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    put_best(out, model(tmp_path / "a", "old"))
    new = model(tmp_path / "b", "new")
    rename, calls = Path.rename, 0

    def failing(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == cut:
            raise OSError("cut short")
        return rename(self, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", failing)
        if cut <= 2:
            with pytest.raises(OSError, match="cut short"):
                put_best(out, new)
        else:
            put_best(out, new)
    assert (out / "best").exists() is (cut != 2)  # between the two renames neither has the name
    take_back(out)
    assert held(out) == ("new" if cut == 3 else "old")
    put_best(out, new)
    assert held(out) == "new" and [p.name for p in out.iterdir()] == ["best"]


def test_an_old_copy_that_was_not_yet_removed_is_removed(tmp_path: Path) -> None:
    model(tmp_path / "best", "new")
    model(tmp_path / ".best.old", "old")
    take_back(tmp_path)
    assert held(tmp_path) == "new" and [p.name for p in tmp_path.iterdir()] == ["best"]

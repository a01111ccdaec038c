"""`twodice report`: the page again from the records; one clear line where there are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.support.report_cases import full_report

from twodice.cli.main import main
from twodice.study import summary
from twodice.study.schema import Report


def write_example(folder: Path) -> Report:
    """Stands in for the summary of true records, which has its own tests."""
    report = full_report()
    (folder / "report.json").write_text(report.as_json(), encoding="utf-8")
    return report


def test_report_prints_the_answer_and_where_the_page_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(summary, "write_summary", write_example)
    with pytest.raises(SystemExit) as stop:
        main(["report", str(tmp_path)])
    assert stop.value.code in (0, None)
    assert capsys.readouterr().out == f"{full_report().answer}\n{tmp_path / 'report.html'}\n"
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path), "--json"])
    assert json.loads(capsys.readouterr().out)["answer"] == full_report().answer


def test_a_folder_without_records_is_an_error_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(SystemExit) as stop:
            main(["report", str(folder)])
        shown = capsys.readouterr()
        assert stop.value.code == 2 and shown.out == ""
        assert shown.err.startswith("error: ") and shown.err.count("\n") <= 2 and "records" in shown.err

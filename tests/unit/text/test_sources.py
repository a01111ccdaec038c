"""What is read, what is passed over with a notice, and what is refused, with the words of the refusal."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twodice.errors import ConfigError, DataError
from twodice.text.corpora import TEXT_SUFFIXES, check_utf8, load_documents


def test_python_docs_are_the_topics_in_order_of_their_names() -> None:
    corpus = load_documents(["python-docs"])
    names = [document.name for document in corpus.documents]
    assert names == sorted(names) and len(names) > 60
    assert corpus.num_bytes > 300_000 and not corpus.completion_only
    assert corpus.documents == load_documents(["python-docs"]).documents


def test_a_folder_is_read_recursively_in_order_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, text in (
        ("b/two.md", "two"), ("one.txt", "one"), ("three.py", "3"), (".hidden.txt", "no"),
        (".git/x.txt", "no"), ("picture.png", "no"),
        ("b/empty.txt", ""), ("rows.jsonl", '{"text": "four"}\n'),
    ):  # fmt: skip
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "again").symlink_to(tmp_path / "b")
    corpus = load_documents([str(tmp_path)])
    assert [document.text for document in corpus.documents] == ["two", "one", "four", "3"]
    said = "\n".join(corpus.notices)
    for words in ("2 hidden", "1 links", "1 empty files", "other endings (.png) skipped"):
        assert words in said


def test_a_link_that_leads_nowhere_is_passed_over_and_said(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("one", encoding="utf-8")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere.txt")
    corpus = load_documents([tmp_path])
    assert [document.text for document in corpus.documents] == ["one"]
    assert any("1 links that lead nowhere skipped" in notice for notice in corpus.notices)


@pytest.mark.parametrize("name", ["", "a\0b", "~a-user-who-is-not-here/x"])
def test_a_source_that_can_be_no_path_is_refused_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one.txt").write_text("one", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="must"):
        load_documents([name])


def test_a_number_with_too_many_digits_is_refused_by_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "fine"}\n{"text": "x", "id": ' + "1" * 5000 + "}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"line 2 must be one JSON object.*too many digits"):
        load_documents([file])


def test_a_file_that_is_named_is_read_whatever_its_ending(tmp_path: Path) -> None:
    (tmp_path / "notes.xyz").write_text("hello")
    assert load_documents([str(tmp_path / "notes.xyz")]).documents[0].text == "hello"


def test_byte_order_mark_and_crlf_are_changed_and_said(tmp_path: Path) -> None:
    file = tmp_path / "windows.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\nthree\rfour")
    corpus = load_documents([file])
    assert corpus.documents[0].data == b"one\ntwo\nthree\rfour"
    assert any("byte order mark" in notice for notice in corpus.notices)
    assert any("2 line ends \\r\\n" in notice for notice in corpus.notices)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"\xef\xbb\xbf", "it is empty"),
        (b" \n\t\n", "empty but for white space"),
        (b"GIF89a\x00\x01", "binary (a zero byte at byte 6)"),
        (b"\xff\xfeh\x00i\x00", "UTF-16"),
        (b"good\nbad \xe9 byte", "byte 9 (line 2) is 0xe9"),
        (b"cut short \xe2\x82", "byte 10 (line 1) is 0xe2"),
    ],
)
def test_a_file_that_is_no_text_is_refused_by_name_and_place(
    tmp_path: Path, content: bytes, words: str
) -> None:
    file = tmp_path / "bad.txt"
    file.write_bytes(content)
    with pytest.raises(DataError) as caught:
        load_documents([file])
    assert words in str(caught.value) and "bad.txt" in str(caught.value)


@given(st.binary(max_size=64), st.integers(1, 9))
def test_the_place_of_bad_bytes_is_that_of_python_whatever_the_pieces(data: bytes, piece: int) -> None:
    import twodice.text.corpora as corpora

    before, corpora._PIECE = corpora._PIECE, piece
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        with pytest.raises(DataError, match=rf"byte {error.start} "):
            check_utf8(data, "x")
    else:
        check_utf8(data, "x")
    finally:
        corpora._PIECE = before


def test_a_folder_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds none"):
        load_documents([tmp_path])
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match="every file in it is empty"):
        load_documents([tmp_path])
    with pytest.raises(DataError, match="at least one source"):
        load_documents([])


def test_a_missing_source_is_named_with_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "shakespeare.txt").write_text("x")
    with pytest.raises(DataError, match=r"did you mean '.*/shakespeare.txt'\?"):
        load_documents([tmp_path / "shakespear.txt"])
    with pytest.raises(DataError, match="did you mean 'python-docs'"):
        load_documents(["pyton-docs"])
    with pytest.raises(DataError, match="did you mean 'markov'"):
        load_documents(["markow:bytes=10"])
    with pytest.raises(DataError, match="there is no"):
        load_documents([tmp_path / "none" / "rows.parquet"])
    with pytest.raises(ConfigError, match="did you mean 'symbols'"):
        load_documents(["markov:symbol=3"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    file = tmp_path / "closed.txt"
    file.write_text("x")
    file.chmod(0)
    with pytest.raises(DataError, match=r"closed.txt must be a readable file.*Permission"):
        load_documents([file])


def test_what_the_system_refuses_to_read_is_said_in_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(self))

    (tmp_path / "closed.txt").write_text("x")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"closed.txt must be a readable file.*Permission denied"):
        load_documents([tmp_path / "closed.txt"])


def jsonl(tmp_path: Path, *lines: object) -> Path:
    """A JSONL file; text lines as they are, other values as JSON."""
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), encoding="utf-8")
    return file


def test_jsonl_takes_the_field_that_is_asked_for(tmp_path: Path) -> None:
    file = jsonl(
        tmp_path, {"text": "a", "body": "x"}, "", {"text": "", "body": "y"}, {"text": "c\r\nd", "body": "z"}
    )
    corpus = load_documents([file])
    assert [document.text for document in corpus.documents] == ["a", "c\nd"]
    assert any("1 records with empty text" in notice for notice in corpus.notices)
    assert [document.text for document in load_documents([file], field="body").documents] == ["x", "y", "z"]


def test_prompts_with_completions_count_the_completion_only(tmp_path: Path) -> None:
    (document,) = load_documents([jsonl(tmp_path, {"prompt": "2+2=", "completion": "4"})]).documents
    assert document.parts is not None and document.text == "2+2=4"
    assert [(part.data, part.counted) for part in document.parts] == [(b"2+2=", False), (b"4", True)]


def test_messages_count_what_the_assistant_says(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
    ]
    corpus = load_documents([jsonl(tmp_path, {"messages": messages})])
    (document,) = corpus.documents
    assert corpus.completion_only and document.parts is not None
    assert document.text == "<|system|>\nBe brief.\n<|user|>\nHi\n<|assistant|>\nHello"
    assert [part.data for part in document.parts if part.counted] == [b"Hello"]


USER = {"role": "user", "content": "Hi"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "a', "line 2 must be one JSON object; it is broken: Unterminated string"),
        ("[" * 100_000, "line 2 must be one JSON object; it is broken"),
        ("[1, 2]", "line 2 must be one JSON object; got a list"),
        ({"txt": "a", "id": 3}, "line 2 must have a field 'text'"),
        ({"txt": "a", "id": 3}, "it has txt, id; did you mean 'txt'?"),
        ({}, "it has nothing"),
        ({"text": 17}, "line 2: text must be text; got a number (17)"),
        ({"text": None}, "line 2: text must be text; got null"),
        ({"text": ["a"]}, "line 2: text must be text; got a list"),
        ('{"text": "\\ud800"}', "half of a surrogate pair"),
        ({"prompt": "a", "completion": ""}, "line 2: completion must hold text; it is empty"),
        ({"prompt": "a", "completion": 4}, "line 2: completion must be text; got a number (4)"),
        ({"messages": []}, "line 2: messages must be a list with at least one message; got an empty list"),
        ({"messages": "hi"}, "must be a list with at least one message; got text"),
        ({"messages": [USER]}, "at least one of the assistant"),
        ({"messages": [{"role": "user"}]}, "message 1 must be an object with role and content"),
        ({"messages": [{"role": "asistant", "content": "x"}]}, "did you mean 'assistant'?"),
        (
            {"messages": [USER, {"role": "assistant", "content": None}]},
            "message 2: content must be text; got null",
        ),
        ({"prompt": "a", "completion": "b"}, "either plain text or prompts with completions"),
    ],
)
def test_a_bad_record_is_refused_by_file_and_line(tmp_path: Path, line: object, words: str) -> None:
    with pytest.raises(DataError) as caught:
        load_documents([jsonl(tmp_path, {"text": "good"}, line)])
    assert words in str(caught.value) and "rows.jsonl" in str(caught.value)


def test_a_field_asked_for_by_name_is_never_replaced_by_another(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="must have a field 'body'"):
        load_documents([jsonl(tmp_path, {"prompt": "a", "completion": "b"})], field="body")


def test_parquet_takes_one_column_row_by_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    table = pyarrow.table({"text": [f"row {i}" for i in range(3000)], "id": list(range(3000))})
    pyarrow.parquet.write_table(table, file, row_group_size=700)
    corpus = load_documents([file])
    assert len(corpus.documents) == 3000 and corpus.documents[-1].text == "row 2999"
    with pytest.raises(DataError, match=r"must have a column 'txt'; it has text, id; did you mean 'text'"):
        load_documents([file], field="txt")
    with pytest.raises(DataError, match=r"row 1: id must be text; got a number"):
        load_documents([file], field="id")


def test_parquet_holds_prompts_and_messages_as_well(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["p"], "completion": ["c"]}), file)
    assert load_documents([file]).documents[0].text == "pc"
    turns = [[{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]]
    pyarrow.parquet.write_table(pyarrow.table({"messages": turns}), file)
    assert load_documents([file]).completion_only


def test_a_file_that_only_calls_itself_parquet_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    file.write_bytes(b"PAR1 but not really")
    with pytest.raises(DataError, match=r"rows.parquet must be a readable Parquet file"):
        load_documents([file])


def test_the_page_on_data_says_what_the_source_does() -> None:
    from twodice.text.markov import MarkovSource
    from twodice.text.tokenizer import BYTES_PER_ENTRY, LARGEST_VOCABULARY, SMALLEST_VOCABULARY

    page = (Path(__file__).parents[3] / "docs" / "data.md").read_text(encoding="utf-8")
    listed = " ".join(
        page.split("these endings are read as text:")[1].split(".\nHidden")[0].replace("`", "").split()
    )
    assert set(listed.split()) == TEXT_SUFFIXES
    defaults = re.search(r"`(markov:[^`]*order=\d)`", page)
    assert defaults is not None and MarkovSource.parse(defaults[1]) == MarkovSource()
    rule = f"at least {BYTES_PER_ENTRY} bytes of training text for each entry, between {SMALLEST_VOCABULARY}"
    assert f"{rule}\nand {LARGEST_VOCABULARY:,}" in page


def test_the_text_floor_never_imports_torch() -> None:
    import subprocess
    import sys

    code = (
        "import sys; import twodice.text.store, twodice.text.corpora, twodice.text.batches; "
        "from twodice.random.keys import Key; import numpy as np; "
        "twodice.text.batches.BatchPlan(10, 3, Key(0)).indices(5); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

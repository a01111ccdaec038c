"""Streams of text: whole characters only, stop strings never shown, cut alike however the text comes."""

from __future__ import annotations

from typing import Any

import pytest

from twodice.generation.text import Detokenizer, TokenBytes

from .conftest import byte_tokenizer

TEXTS = ["plain", "wörld ÄÖ", "日本語 text", "a\U0001f600\U0001f468‍\U0001f469b", "  spaces\n\ttabs "]


def metaspace_tokenizer() -> Any:
    """A tokenizer in the manner of Llama 2: word starts marked by U+2581, unknown characters as bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz"]
    model = models.BPE(
        vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True
    )
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def run(tokenizer: Any, prompt: list[int], tokens: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    stream = Detokenizer(tokenizer).stream(prompt, stop)
    pieces = []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.stopped:
            return pieces
    return [*pieces, stream.finish()]


@pytest.mark.parametrize("text", TEXTS)
def test_no_piece_holds_a_part_of_a_character(text: str) -> None:
    tokenizer = byte_tokenizer()
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) == len(text.encode())
    pieces = run(tokenizer, [], tokens)
    assert "".join(pieces) == text
    assert all("�" not in piece for piece in pieces)


def test_broken_bytes_become_replacement_characters_as_the_tokenizer_writes_them() -> None:
    tokenizer = byte_tokenizer()
    for data in (
        b"a\xffb",
        b"\xe2\x82",
        b"\xe2\x82\xac\xe2\x28\xa1",
        b"\xf0\x9f\x98",
        b"\xed\xa0\x80",
        b"\x80" * 20,
    ):
        tokens = list(data)
        assert [TokenBytes(tokenizer)[token] for token in tokens] == [bytes([byte]) for byte in data]
        assert (
            "".join(run(tokenizer, [], tokens)) == tokenizer.decode(tokens) == data.decode("utf-8", "replace")
        )


def test_a_merged_token_and_an_added_one_have_their_bytes() -> None:
    tokenizer = byte_tokenizer(merges=(("h", "e"), ("Ã", "¶")))
    tokenizer.add_tokens(["<ähm>"])
    table = TokenBytes(tokenizer)
    ids = {word: tokenizer.convert_tokens_to_ids(word) for word in ("he", "Ã¶", "<ähm>", "<|endoftext|>")}
    assert [table[i] for i in ids.values()] == [b"he", "ö".encode(), "<ähm>".encode(), b""]
    assert table[5000] == b""  # a row of the model that no token uses


@pytest.mark.parametrize("text", ["plain words here", "w ö rld", "日本 x", "ab\U0001f600c"])
def test_other_tokenizers_stream_what_they_decode(text: str) -> None:
    tokenizer = metaspace_tokenizer()
    tokens = tokenizer(text)["input_ids"]
    for cut in range(1, len(tokens)):
        before = tokenizer.decode(tokens[:cut])
        if before.endswith("�"):
            continue
        assert before + "".join(run(tokenizer, tokens[:cut], tokens[cut:])) == text


def test_other_tokenizers_do_not_wait_for_ever_for_a_character() -> None:
    tokenizer = metaspace_tokenizer()
    stream = Detokenizer(tokenizer).stream([])
    lone = tokenizer.convert_tokens_to_ids("<0x80>")
    pieces = [stream.push(lone) for _ in range(40)]
    assert sum(map(len, pieces)) >= 30


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("two", "ne t"), "o"),
        ("abc", ("abc", "b"), "a"),  # "b" is complete first
        ("aab", ("ab",), "a"),
        ("ababac", ("abac",), "ab"),
        ("almost sto", ("stop",), "almost sto"),
        ("\n\nend", ("\n\n",), ""),
        ("日本語", ("本",), "日"),
        ("never", ("x" * 99,), "never"),
    ],
)
def test_stop_strings_cut_alike_however_the_text_comes(
    text: str, stop: tuple[str, ...], expected: str
) -> None:
    tokenizer = byte_tokenizer()
    by_byte = run(tokenizer, [], tokenizer(text)["input_ids"], stop)
    assert "".join(by_byte) == expected
    whole = byte_tokenizer()
    whole.add_tokens([text])
    assert "".join(run(whole, [], [whole.convert_tokens_to_ids(text)], stop)) == expected


def test_nothing_is_shown_that_may_become_a_stop_string() -> None:
    tokenizer = byte_tokenizer()
    pieces = run(tokenizer, [], tokenizer("x stay stop")["input_ids"], ("stop",))
    shown = ""
    for piece in pieces:
        shown += piece
        assert "x stay ".startswith(shown)
    assert shown == "x stay "

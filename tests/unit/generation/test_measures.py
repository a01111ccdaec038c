"""Known answers for the measures of generated text; self-BLEU against figures of NLTK 3.10.4 (method1)."""

from __future__ import annotations

import math

import numpy as np
import pytest

from twodice.errors import DataError
from twodice.generation.measures import (
    CopyIndex,
    Loop,
    distinct_n,
    find_loop,
    longest_copied,
    looping_tail,
    own_loss,
    rep_4,
    rep_n,
    self_bleu,
)


def test_repeated_4_grams_are_counted_once_for_each_repeat() -> None:
    assert rep_4("abcdefgh") == 0.0
    assert rep_4("aaaaaaaa") == pytest.approx(4 / 5)  # 5 windows, 1 kind
    assert rep_4([1, 2, 3, 4, 9, 1, 2, 3, 4]) == pytest.approx(1 / 6)
    assert rep_n([1, 1, 1], 1) == pytest.approx(2 / 3)


def test_a_text_too_short_for_two_4_grams_repeats_nothing() -> None:
    assert [rep_4("abcd"[:n]) for n in range(5)] == [0.0] * 5


def test_a_loop_is_found_with_its_phrase_and_copies() -> None:
    assert find_loop([7, 8, 1, 2, 3, 1, 2, 3]) == Loop(3, 2)
    assert find_loop("so it goes on and on and on and on") == Loop(7, 3)
    assert find_loop(np.array([1, 2, 3] * 5)) == Loop(3, 5)


@pytest.mark.parametrize(
    ("text", "loops"),
    [
        ("", False),
        ("a", False),
        ("abcabd", False),
        ("abcabc", True),
        ("abcabc!", False),  # only the tail counts
        ("hahaha", False),  # two symbols, three copies
        ("a" * 50, False),
        ("a" * 51, True),  # more than 50 copies of a short phrase
        ("ha" * 50, False),
        ("ha" * 51, True),
    ],
)
def test_holtzmans_rule_at_its_edges(text: str, loops: bool) -> None:
    assert looping_tail(text) is loops


def test_a_phrase_of_90_symbols_is_the_longest_that_counts() -> None:
    assert looping_tail([*range(90)] * 2)
    assert not looping_tail([*range(91)] * 2)


def test_distinct_n_is_types_by_tokens_over_all_texts() -> None:
    assert distinct_n(["abab"], 1) == pytest.approx(2 / 4)
    assert distinct_n(["abab"], 2) == pytest.approx(2 / 3)
    assert distinct_n(["abab", "cd"], 2) == pytest.approx(3 / 4)  # no bigram across two texts
    assert distinct_n([[1, 2], []], 1) == 1.0
    assert distinct_n(["", "a"], 2) == 0.0


_WORDS = [
    "the cat sat on the mat and the cat slept".split(),
    "the cat sat on the rug".split(),
    "a dog ran off with the mat of the cat".split(),
    "nothing in common here at all".split(),
]
_LETTERS = (
    "eacaddd dbadaddeadcbeacaaaeadbd aebddebcbbdcadeabcacedebcc dedeadbddbcecadeabedc adaceeedbbebabeebd "
    "cecdceeadebeebdadce beddcdcaeeeecdeabbee aecaaaad cbc ebccab cebccdcd aacdcdbcacebedabad abdedeb "
    "edbeadecdacbbacaaccbdec aeaebed eeadbcab debdadcedacedcabbcebc bcadecedebaaabbb bcceeccccacbedbeeaca "
    "adbbcaeedaeebeac"
).split()


def test_self_bleu_equals_nltk() -> None:
    assert self_bleu(_WORDS) == pytest.approx(0.3144190620947107, rel=1e-12)
    assert self_bleu(_WORDS[:3]) == pytest.approx(0.29598440379754837, rel=1e-12)
    assert self_bleu(_WORDS[:3], n=2) == pytest.approx(0.4315653294898241, rel=1e-12)
    assert self_bleu(_LETTERS) == pytest.approx(0.6567993736317339, rel=1e-12)


def test_self_bleu_of_equal_texts_is_one_and_of_strangers_zero() -> None:
    assert self_bleu(["abcdef"] * 5) == pytest.approx(1.0)
    assert self_bleu(["abcdef", "ghijkl", "mnopqr"]) == 0.0


def test_self_bleu_with_a_copy_under_another_clipping_owner() -> None:
    """Whoever holds the highest count is clipped by the second highest, which may be as high."""
    expected = (2 / 3 + 1.0 * math.exp(1 - 3 / 2)) / 2  # 'aaa' has 2 of 3 letters in 'aa'; 'aa' is short
    assert self_bleu(["aaa", "aa"], n=1) == pytest.approx(expected)
    assert self_bleu(["aaa", "aaa", "a"], n=1) == pytest.approx((1 + 1 + math.exp(1 - 3)) / 3)


def test_self_bleu_needs_two_texts() -> None:
    with pytest.raises(DataError, match="at least 2 texts"):
        self_bleu(["alone"])


def test_own_loss_is_the_mean_in_nats() -> None:
    assert own_loss([math.log(0.5), math.log(0.125)]) == pytest.approx(2 * math.log(2))
    with pytest.raises(DataError, match="at least one token"):
        own_loss([])


def test_longest_copied_run_known_answers() -> None:
    training = "the quick brown fox jumps over the lazy dog"
    assert longest_copied("a quick brown cat", training) == len(" quick brown ")
    assert longest_copied("", training) == 0
    assert longest_copied("ÄÖÜ", training) == 0
    assert longest_copied(training, training) == len(training)
    assert longest_copied("abc", "") == 0
    assert CopyIndex("banana").find("xxnanab") == (4, 2)


def test_runs_are_counted_in_characters_for_text_and_in_tokens_for_ids() -> None:
    assert longest_copied("héé wörld", "say wörld") == len(" wörld")
    assert longest_copied("a\U0001f600\U0001f601b", "x\U0001f600\U0001f601y") == 2
    assert (
        longest_copied([5, 60_000, 55_300, 7], [1, 60_000, 55_300, 2]) == 2
    )  # surrogate numbers are ids here
    assert longest_copied([0, 0, 1], [0, 0, 0]) == 2


def test_no_run_crosses_the_border_of_two_documents() -> None:
    assert longest_copied("onetwo", ["one", "two"]) == 3
    assert longest_copied("onetwo", "onetwo") == 6


def test_longest_copied_run_equals_brute_force() -> None:
    state = 12345
    for case in range(60):
        symbols = []
        for _ in range(110):
            state = (state * 1103515245 + 12345) % 2**31
            symbols.append("ab"[(state >> 16) & 1] if case % 2 else "abcd"[(state >> 16) & 3])
        training, text = "".join(symbols[:80]), "".join(symbols[80:])
        runs = (j - i for i in range(30) for j in range(i, 31) if text[i:j] in training)
        index = CopyIndex(training)
        assert index.longest(text) == max(runs)
        assert text in index if text in training else text not in index


def test_the_index_survives_one_letter_repeated() -> None:
    assert CopyIndex("a" * 5000).longest("b" + "a" * 300) == 300

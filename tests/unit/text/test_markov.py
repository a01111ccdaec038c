"""The Markov source draws what its table says, and its entropy is the true one."""

from __future__ import annotations

import math

import numpy as np
import pytest

from twodice.errors import ConfigError
from twodice.text.corpora import load_documents
from twodice.text.markov import ALPHABET, MarkovSource


@pytest.mark.parametrize("symbols", [2, 5, 16, 64])
@pytest.mark.parametrize("order", [1, 2])
def test_rows_are_whole_parts_of_256_and_every_text_is_possible(symbols: int, order: int) -> None:
    counts = MarkovSource(symbols=symbols, order=order).counts()
    assert counts.shape == (symbols**order, symbols)
    assert (counts.sum(axis=1) == 256).all() and counts.min() >= 1


def test_the_text_is_a_function_of_its_options_and_longer_begins_like_shorter() -> None:
    text = MarkovSource(num_bytes=5000).draw()
    assert text == MarkovSource(num_bytes=5000).draw() and len(text) == 5000
    assert MarkovSource(num_bytes=9001).draw().startswith(text)
    assert MarkovSource(num_bytes=5000, seed=1).draw() != text
    assert set(text.decode()) <= set(ALPHABET[:16])


def test_entropy_of_two_symbols_is_that_of_the_closed_form() -> None:
    source = MarkovSource(symbols=2, order=1)
    (stay_a, go_b), (go_a, stay_b) = (source.counts() / 256).tolist()

    def entropy(*row: float) -> float:
        return -sum(p * math.log(p) for p in row)

    share_a = go_a / (go_a + go_b)
    truth = share_a * entropy(stay_a, go_b) + (1 - share_a) * entropy(go_a, stay_b)
    assert source.entropy_nats() == pytest.approx(truth, rel=1e-12)


def losses(source: MarkovSource, text: bytes) -> tuple[np.ndarray, float]:
    """Nats of each symbol of `text` under the source's own table."""
    index = {letter: i for i, letter in enumerate(ALPHABET.encode())}
    symbols = np.array([index[byte] for byte in text])
    k, state = source.symbols, symbols[:-1]
    if source.order == 2:
        state, symbols = symbols[:-2] * k + symbols[1:-1], symbols[1:]
    nats = -np.log(source.counts()[state, symbols[1:]] / 256)
    # Neighbours are correlated: the error of the mean comes from means of blocks of 1000.
    blocks = nats[: len(nats) // 1000 * 1000].reshape(-1, 1000).mean(axis=1)
    return nats, float(blocks.std(ddof=1) / math.sqrt(len(blocks)))


@pytest.mark.parametrize("order", [1, 2])
def test_the_drawn_text_costs_its_entropy_under_its_own_table(order: int) -> None:
    """Hypothesis: mean cost = entropy rate; 400,000 draws; |z| < 5 (two-sided false alarm 6e-7).

    Smallest defect: with a standard error near 0.0012 nats, a shift of 0.012 nats (half a percent) is seen
    with probability above 0.999.
    """
    source = MarkovSource(symbols=16, num_bytes=400_000, order=order, seed=3)
    nats, error = losses(source, source.draw())
    assert error < 0.0025
    assert abs(nats.mean() - source.entropy_nats()) < 5 * error


def test_a_source_that_draws_from_another_table_is_rejected() -> None:
    """The saboteur: one byte in 64 is replaced by the most common symbol."""
    source = MarkovSource(symbols=16, num_bytes=400_000, order=1, seed=3)
    spoiled = bytearray(source.draw())
    spoiled[::64] = bytes([ALPHABET.encode()[0]]) * len(spoiled[::64])
    nats, error = losses(source, bytes(spoiled))
    assert abs(nats.mean() - source.entropy_nats()) > 5 * error


def test_options_are_read_and_wrong_ones_refused() -> None:
    source = MarkovSource.parse("markov:symbols=4,bytes=1_000,seed=7,order=1")
    assert source == MarkovSource(4, 1000, 7, 1)
    corpus = load_documents(["markov:bytes=1000"])
    assert corpus.num_bytes == 1000 and corpus.entropy_nats_per_byte == MarkovSource().entropy_nats()
    assert load_documents(["markov:bytes=100", "python-docs"]).entropy_nats_per_byte is None
    for text, words in (
        ("markov:symbols=65", r"symbols of markov must be in \[2, 64\]; got 65"),
        ("markov:bytes=0", "bytes of markov must be in"),
        ("markov:order=3", "order of markov must be in"),
        ("markov:seed=x", "seed of markov must be an integer"),
        ("markov:seed=1,seed=2", "seed came twice"),
        ("markov:sed=1", "did you mean 'seed'"),
        ("markov:", "markov takes symbols, bytes, seed, order"),
    ):
        with pytest.raises(ConfigError, match=words):
            MarkovSource.parse(text)

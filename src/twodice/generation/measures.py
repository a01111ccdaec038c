"""What a generated text is like: repetition, loops, diversity, likelihood, copying from the training text.

Pure functions of texts. Knows no model, no tokenizer and no torch. A *text* is here a sequence of hashable
symbols: token ids, words, or a plain string (then the symbols are its characters). No function draws
anything.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from twodice.errors import DataError

#: The longest phrase that Holtzman's rule looks for, and what it asks of short and of long ones.
LONGEST_LOOP, SHORTEST_PHRASE, COPIES_OF_A_SHORT_ONE = 90, 3, 50

#: NLTK's default for smoothing method 1.
_BLEU_EPSILON = 0.1

#: Stands between two training documents, so that no run is counted across their border (a Unicode
#: noncharacter).
_BORDER = "\U0010ffff"


def _ngrams(text: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    """All n-grams in order, `len(text) - n + 1` of them or none."""
    return list(zip(*(text[i:] for i in range(n)), strict=False))


def rep_n(text: Sequence[Hashable], n: int) -> float:
    """Share of n-grams that repeat an earlier one: ``1 - unique / all``.

    Parameters
    ----------
    text
        Symbols of one text.
    n
        Length of the n-grams, at least 1.

    Returns
    -------
    float
        In [0, 1): 0 where nothing repeats, and for a text with fewer than two n-grams.

    References
    ----------
    Welleck et al., "Neural Text Generation with Unlikelihood Training", ICLR 2020, section 6.1 (seq-rep-n).
    """
    _check_n(n)
    count = len(text) - n + 1
    return 1.0 - len(set(_ngrams(text, n))) / count if count > 0 else 0.0


def rep_4(text: Sequence[Hashable]) -> float:
    """Share of repeated 4-grams, the usual `rep_n`."""
    return rep_n(text, 4)


@dataclass(frozen=True)
class Loop:
    """A phrase of `length` symbols that stands `copies` times in a row at the end of a text."""

    length: int
    copies: int


def find_loop(text: Sequence[Hashable]) -> Loop | None:
    """Return the loop in which a text ends, by Holtzman's rule, or None.

    Among the phrases of 1 to 90 symbols that end the text, the one with the most copies in a row is taken
    (the shortest of equals). It is a loop when it has at least 2 copies and at least 3 symbols, or more than
    50 copies. So ``abcabc`` ends in a loop, while ``hahaha`` and 40 spaces do not: they are phrases of two
    symbols and of one.

    References
    ----------
    Holtzman et al., "The Curious Case of Neural Text Degeneration", ICLR 2020; the rule is that of the code
    that the authors published (``ari-holtzman/degen``, ``metrics/repetition.py``).
    """
    text = text if isinstance(text, str) else list(text)  # arrays compare by element
    best = Loop(0, 1)
    size = len(text)
    for length in range(1, min(LONGEST_LOOP, size // 2) + 1):
        phrase = text[size - length :]
        copies = 1
        while (start := size - length * (copies + 1)) >= 0 and text[start : start + length] == phrase:
            copies += 1
        if copies > best.copies:
            best = Loop(length, copies)
    if best.copies > 1 and (best.length >= SHORTEST_PHRASE or best.copies > COPIES_OF_A_SHORT_ONE):
        return best
    return None


def looping_tail(text: Sequence[Hashable]) -> bool:
    """Whether a text ends in a loop (`find_loop`). The published "repetition %" is their share."""
    return find_loop(text) is not None


def distinct_n(texts: Iterable[Sequence[Hashable]], n: int) -> float:
    """Different n-grams divided by all n-grams, over all texts together.

    Returns
    -------
    float
        In (0, 1]; falls as the texts grow longer, so compare equal lengths only. 0 where no text holds an
        n-gram.

    References
    ----------
    Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models", NAACL 2016. Li
    divides by the number of tokens; like most later code this divides by the number of n-grams, so that 1
    means "all different" for every n. Holtzman's published code counts the n-grams that occur exactly once,
    which is another number.
    """
    _check_n(n)
    seen: set[tuple[Hashable, ...]] = set()
    count = 0
    for text in texts:
        grams = _ngrams(text, n)
        seen.update(grams)
        count += len(grams)
    return len(seen) / count if count else 0.0


def self_bleu(texts: Sequence[Sequence[Hashable]], n: int = 4) -> float:
    """How much each text resembles the others: the mean BLEU of each against the rest. Lower: more diverse.

    Parameters
    ----------
    texts
        At least two texts.
    n
        Longest n-gram; lengths 1 to n weigh the same.

    Returns
    -------
    float
        In [0, 1]; 1 when all texts are equal (and have at least `n` symbols).

    Raises
    ------
    DataError
        Fewer than two texts.

    Notes
    -----
    BLEU of one text is ``brevity * exp(mean over m of log p_m)`` where ``p_m`` is the clipped precision of
    its m-grams; a numerator of 0 counts as 0.1 (smoothing method 1), except that without one common symbol
    the result is 0. The clipping count of an n-gram is its highest count in *another* text, so the two
    highest counts decide, and the whole takes time in proportion to the texts instead of its square.

    References
    ----------
    Zhu et al., "Texygen", SIGIR 2018 (self-BLEU); Papineni et al., ACL 2002 (BLEU); Chen and Cherry, WMT
    2014, section 3.1, smoothing 1. Equals ``nltk.translate.bleu_score.sentence_bleu`` with ``method1``.
    """
    _check_n(n)
    if len(texts) < 2:
        raise DataError(
            f"self-BLEU needs at least 2 texts, each is held against the others; got {len(texts)}"
        )
    log_precision = np.zeros(len(texts))
    has_common_symbol = np.zeros(len(texts), dtype=bool)
    for m in range(1, n + 1):
        counts = [Counter(_ngrams(text, m)) for text in texts]
        first: dict[tuple[Hashable, ...], tuple[int, int]] = {}  # n-gram -> (highest count, whose it is)
        second: dict[tuple[Hashable, ...], int] = {}  # n-gram -> highest count among the others
        for owner, counter in enumerate(counts):
            for gram, count in counter.items():
                top = first.get(gram)
                if top is None:
                    first[gram] = (count, owner)
                elif count > top[0]:
                    first[gram], second[gram] = (count, owner), top[0]
                elif count > second.get(gram, 0):
                    second[gram] = count
        for i, counter in enumerate(counts):
            common = 0
            for gram, count in counter.items():
                top_count, owner = first[gram]
                common += min(count, second.get(gram, 0) if owner == i else top_count)
            total = max(1, sum(counter.values()))
            log_precision[i] += math.log((common if common else _BLEU_EPSILON) / total) / n
            if m == 1:
                has_common_symbol[i] = common > 0
    score = np.exp(log_precision) * _brevity([len(text) for text in texts])
    return float(np.where(has_common_symbol, score, 0.0).mean())


def _brevity(lengths: Sequence[int]) -> np.ndarray:
    """Brevity penalty of each text against the nearest length among the others (of two, the shorter)."""
    penalties = np.ones(len(lengths))
    for i, length in enumerate(lengths):
        others = (other for j, other in enumerate(lengths) if j != i)
        nearest = min(others, key=lambda other: (abs(other - length), other))
        if length == 0:
            penalties[i] = 0.0
        elif length < nearest:
            penalties[i] = math.exp(1.0 - nearest / length)
    return penalties


def own_loss(logprobs: Iterable[float]) -> float:
    """Mean negative log-probability that the model itself gives its text [nats/token], before any stage.

    Far below the loss on human text means flat and repetitive, far above means incoherent: lower is not
    better.

    Parameters
    ----------
    logprobs
        The model's raw log-probability of each generated token [nats]; at least one.
    """
    values = np.asarray(list(logprobs), dtype=np.float64)
    if not values.size:
        raise DataError("the model's own loss needs at least one token; got none")
    return float(-values.mean())


class CopyIndex:
    """A training text, sorted so that the longest run a text copies from it is found at once.

    Parameters
    ----------
    training
        One string, several (documents: no run is counted across their border), or one sequence of token ids.
        Runs are then counted in characters, respectively in tokens.

    Notes
    -----
    A suffix array by prefix doubling (Manber and Myers 1993), the ranks sorted by numpy: about a second for a
    million characters, 8 bytes a character when done. A query takes a few milliseconds and is exact.
    """

    def __init__(self, training: str | Iterable[str] | Sequence[int]) -> None:
        self._text = _as_string(training, _BORDER)
        self._order = memoryview(_suffix_array(self._text))  # type: ignore[arg-type]

    def __contains__(self, phrase: str | Sequence[int]) -> bool:
        """Whether `phrase` stands somewhere in the training text."""
        return self._holds(_as_string(phrase, ""))

    def find(self, text: str | Sequence[int]) -> tuple[int, int]:
        """Return (length, start in `text`) of the longest run of `text` that stands in the training text.

        The first of several equally long runs; (0, 0) if not one symbol is common.
        """
        own = _as_string(text, "")
        length = start = 0
        for i in range(len(own)):
            # A window that only grows: whatever is longer than the best run so far contains a run of best +
            # 1.
            while i + length < len(own) and self._holds(own[i : i + length + 1]):
                length, start = length + 1, i
        return length, start

    def longest(self, text: str | Sequence[int]) -> int:
        """Length of the longest run of `text` that stands in the training text."""
        return self.find(text)[0]

    def _holds(self, phrase: str) -> bool:
        text, size = self._text, len(phrase)
        at = bisect_left(self._order, phrase, key=lambda i: text[i : i + size])
        return at < len(self._order) and text.startswith(phrase, self._order[at])


def longest_copied(
    text: str | Sequence[int], training: str | Iterable[str] | Sequence[int] | CopyIndex
) -> int:
    """Length of the longest run of `text` found in `training` [characters, or tokens where ids are given].

    Give a `CopyIndex` where many texts are held against one training text; anything else is indexed anew each
    time.
    """
    index = training if isinstance(training, CopyIndex) else CopyIndex(training)
    return index.longest(text)


def _as_string(symbols: str | Iterable[str] | Sequence[int], border: str) -> str:
    """Any text as one string: a token id becomes the character of that number; slices compare fast."""
    if isinstance(symbols, str):
        return symbols
    values = list(symbols)
    if all(isinstance(value, str) for value in values):
        return border.join(values)  # type: ignore[arg-type]
    return "".join(map(chr, values))  # type: ignore[arg-type]


def _suffix_array(text: str) -> np.ndarray:
    """Starts of all suffixes of `text` in the order of the suffixes, int64."""
    size = len(text)
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    rank = np.unique(points, return_inverse=True)[1].astype(np.int64).reshape(-1) + 1
    depth = 1
    while True:
        # A suffix sorts by its first `depth` symbols (rank) and then by the next `depth` (0 beyond the end).
        following = np.zeros(size, dtype=np.int64)
        following[: max(0, size - depth)] = rank[depth:]
        pair = rank * (size + 1) + following
        order = np.argsort(pair, kind="stable")
        is_new = np.ones(size, dtype=bool)
        is_new[1:] = np.diff(pair[order]) != 0
        rank = np.empty(size, dtype=np.int64)
        rank[order] = np.cumsum(is_new)
        depth *= 2
        if size == 0 or is_new.all() or depth >= size:
            return order


def _check_n(n: int) -> None:
    if n < 1:
        raise DataError(f"n must be at least 1; got {n}")

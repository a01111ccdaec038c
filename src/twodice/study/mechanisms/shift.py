"""The loss of a model on text that is not as its training text was: characters replaced, another domain.

Losses are in bits per byte, since noise and domain change how many tokens a text is cut into. Knows no
sites.

Letters: N windows, T positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from twodice.errors import ConfigError, DataError
from twodice.random.keys import Key
from twodice.random.permutation import permute
from twodice.random.philox import philox4x32
from twodice.random.thresholds import round_rate
from twodice.study.mechanisms.measures import DOMAINS, other_domain
from twodice.text.corpora import load_documents
from twodice.text.markov import MarkovSource
from twodice.training.evaluate import IGNORED, nats

#: Seed of the Markov source that stands for another domain: no other seed has its table.
_OTHER_SEED = 90_210


def noisy(text: str, rate: float, alphabet: str, key: Key) -> str:
    """A text in which each character is replaced with probability `rate`.

    Parameters
    ----------
    rate
        In [0, 1], rounded to a multiple of 1/65536; 0 gives the text itself.
    alphabet
        What comes in its place: one of these characters, all alike, but never the one that was there. At
        least two different ones.

    Notes
    -----
    Belinkov and Bisk 2018, "Synthetic and natural noise both break neural machine translation" (arXiv
    1711.02173), of whose kinds this is the plainest: they swap neighbours and keep the first and last letter.

    *Randomness.* Character i reads Philox of `key` at counter (i, 0, 0, 0): word 0 decides, word 1 chooses.
    What is replaced at a rate is replaced at every higher one, by the same character.
    """
    if not 0 <= rate <= 1:
        raise ConfigError(f"the rate of noise must be in [0, 1]; got {rate}")
    letters = sorted(set(alphabet))
    if len(letters) < 2:
        raise ConfigError(f"noise needs an alphabet of two characters or more; got {len(letters)}")
    if not text:
        return text
    index = np.arange(len(text), dtype=np.uint64)
    zero = index & np.uint64(0)
    decides, chooses, _, _ = philox4x32(index, zero, zero, zero, key.value)
    replaced = np.flatnonzero((np.asarray(decides) & 0xFFFF) < round_rate(rate))
    place = {letter: i for i, letter in enumerate(letters)}
    out = list(text)
    for i in replaced.tolist():
        old = place.get(out[i])
        if old is None:
            out[i] = letters[int(chooses[i]) % len(letters)]
        else:  # one of the others: a step of 1 to n - 1 around the alphabet
            out[i] = letters[(old + 1 + int(chooses[i]) % (len(letters) - 1)) % len(letters)]
    return "".join(out)


def domain_text(sources: Sequence[str], characters: int) -> str:
    """The beginning of the text of another domain than that of the `sources` trained on (`other_domain`)."""
    if other_domain(sources) == DOMAINS[0]:
        documents = load_documents(["python-docs"]).documents
        return "".join(document.text for document in documents)[:characters]
    return MarkovSource(num_bytes=characters, seed=_OTHER_SEED).draw().decode("ascii")


def sample_text(texts: Sequence[str], characters: int, key: Key) -> list[str]:
    """Documents in a keyed order, cut where they come to `characters` in all.

    *Randomness.* The order is a keyed bijection of the numbers of the documents.
    """
    found: list[str] = []
    left = characters
    for i in permute(key, np.arange(len(texts)), len(texts)).tolist() if texts else []:
        if left <= 0:
            break
        if texts[i]:
            found.append(texts[i][:left])
            left -= len(found[-1])
    if not found:
        raise DataError("a loss on text needs text; every document was empty")
    return found


@torch.no_grad()
def bits_per_byte(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], context: int, rows: int = 8
) -> float:
    """The loss on some texts, each read from its beginning, in windows of `context` tokens.

    Parameters
    ----------
    model
        In eval mode; causal.
    tokenizer
        Its ``encode`` cuts a text; ``end_of_document`` is read before the first token, so that every token of
        the text counts.
    rows
        Windows in one pass.
    """
    device = next(model.parameters()).device
    inputs, targets, size = [], [], 0
    for text in texts:
        ids = [tokenizer.end_of_document, *map(int, tokenizer.encode(text))]
        size += len(text.encode("utf-8"))
        for begin in range(0, len(ids) - 1, context):
            window = ids[begin : begin + context + 1]
            spare = context + 1 - len(window)  # what stands to the right changes nothing on the left
            inputs.append(window[:-1] + [tokenizer.end_of_document] * spare)
            targets.append(window[1:] + [IGNORED] * spare)
    inputs_NT, targets_NT = torch.tensor(inputs), torch.tensor(targets)
    total = 0.0
    for begin in range(0, len(inputs), rows):
        logits = model(input_ids=inputs_NT[begin : begin + rows].to(device), use_cache=False).logits
        total += float(nats(logits, targets_NT[begin : begin + rows].to(device)))
    return total / math.log(2) / size

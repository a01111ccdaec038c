"""From the sources that a configuration names to its store of tokens, made once and reopened after.

The text is split by a key that no seed touches, so that runs of all seeds are measured on the same text. Does
not know models.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from twodice.random.keys import Key
from twodice.text.corpora import load_documents
from twodice.text.store import TokenStore, prepare
from twodice.training.budget import resolve_text
from twodice.training.config import TrainConfig

# The same for every seed and every arm.
SPLIT_KEY = Key(0).child("text")


def store_for(
    config: TrainConfig, folder: str | Path, *, begun: bool = False, say: Callable[[str], None] | None = None
) -> TokenStore:
    """Open the store in `folder`, or make it from the sources of `config`.

    Parameters
    ----------
    config
        As asked for; tokenizer and context are settled here, see `twodice.training.budget.resolve_text`.
    folder
        Where the store is, or is put.
    begun
        The store belongs to a run that has begun: it is taken as it is, whatever has become of the text
        since.
    say
        Is told the notices about the text, one by one, when the store is made.

    Raises
    ------
    ConfigError
        A setting cannot be meant.
    DataError
        The text cannot be read, or is too little.
    """
    folder = Path(folder)
    settled = resolve_text(config).config
    assert settled.context is not None and settled.tokenizer is not None
    if begun:
        return TokenStore.open(folder)
    corpus = load_documents(settled.data, field=settled.field)
    store = prepare(
        corpus,
        tokenizer=settled.tokenizer,
        vocabulary=settled.vocabulary,
        context=settled.context,
        key=SPLIT_KEY,
        out=folder,
        # Only the training part becomes scarce: it is measured on the whole of the validation parts.
        share=settled.share if settled.share < 1 else None,
    )
    if say is not None:
        for text in store.notices_at(settled.context):
            say(text)
    return store

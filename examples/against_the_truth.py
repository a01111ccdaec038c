"""Train on a source whose entropy is known exactly, and hold the loss against the truth.

No model can beat the entropy of the source on text that it has not seen; the distance to it is what is left
to learn.
Run: python examples/against_the_truth.py   (about half a minute)
"""

import tempfile
from pathlib import Path

from twodice.random.keys import Key
from twodice.text.corpora import load_documents
from twodice.text.store import prepare
from twodice.training.config import TrainConfig
from twodice.training.loop import train

with tempfile.TemporaryDirectory() as folder:
    config = TrainConfig(
        data=("markov:bytes=60000",), model="gpt2-nano", tokenizer="bytes", context=32, batch=16, steps=120,
        dropout="residual=0.05", seed=1,
    )  # fmt: skip
    store = prepare(
        load_documents(config.data), tokenizer="bytes", context=config.context,
        key=Key(config.seed).child("text"), out=Path(folder) / "text",
    )  # fmt: skip
    result = train(config, store, Path(folder) / "run")
    truth = store.entropy_nats_per_token
    for evaluation in result.evaluations:
        loss = evaluation["validation_a_nats_per_token"]
        print(
            f"step {evaluation['step']:4d}  validation {loss:.4f}, {loss - truth:+.4f} nats above the truth"
        )

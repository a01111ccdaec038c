"""TRL's `DPOTrainer` with a policy and a reference that share their masks, by `DropoutCallback`.

Only where TRL is installed (it needs pandas and datasets, which nothing else here does); the same arithmetic
without it is in ``tests/unit/dropout/test_pairs.py``.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from tests.support.tiny_models import VOCABULARY, tiny_model

import twodice
from twodice.errors import ContractError

trl = pytest.importorskip("trl", reason="TRL is not among the dependencies")

RATES = "embedding=0.1, attention=0.1, residual=0.1, activation=0.1"
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning"),
]


def tokenizer() -> Any:
    """One token a letter or sign."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    signs = ["<pad>", "<end>", *map(chr, range(65, 65 + VOCABULARY - 2))]
    made = Tokenizer(models.WordLevel({sign: i for i, sign in enumerate(signs)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="<end>", unk_token="<pad>"
    )


def run(out: Path, seed_of_reference: bool, rate: float = 0.0, rows: int | None = 8) -> list[dict[str, Any]]:
    """Train three steps; `seed_of_reference` says whether the reference takes part in the dropout."""
    from datasets import Dataset

    model = tiny_model("llama")
    reference = copy.deepcopy(model)
    pairs = [
        {"prompt": "ABCD", "chosen": "EFGHAB"[: 3 + i % 4], "rejected": "IJKLMN"[: 6 - i % 3]}
        for i in range(16)
    ]
    callback = twodice.DropoutCallback(
        RATES, seed=3, rows=rows, reference=reference if seed_of_reference else None
    )
    trainer = trl.DPOTrainer(
        model,
        reference,
        trl.DPOConfig(
            output_dir=str(out), per_device_train_batch_size=4, max_steps=3, use_cpu=True, report_to=[],
            disable_tqdm=True, logging_steps=1, save_strategy="no", learning_rate=rate, bf16=False,
            gradient_checkpointing=True,
        ),
        train_dataset=Dataset.from_list(pairs),
        processing_class=tokenizer(),
        callbacks=[callback],
    )  # fmt: skip
    was = reference.training
    try:
        trainer.train()
    except ContractError:
        callback.close()
        raise
    assert callback.handle is None and reference.training == was
    return [entry for entry in trainer.state.log_history if "rewards/chosen" in entry]


def test_equal_weights_with_shared_masks_are_rewarded_with_exactly_nothing(tmp_path: Path) -> None:
    shared, alone = run(tmp_path / "a", True), run(tmp_path / "b", False)
    assert len(shared) == len(alone) == 3
    assert all(entry[f"rewards/{side}"] == 0 for entry in shared for side in ("chosen", "rejected"))
    assert all(abs(entry[f"rewards/{side}"]) > 1e-4 for entry in alone for side in ("chosen", "rejected"))
    learned = run(tmp_path / "c", True, rate=1e-2)
    assert learned[0]["rewards/chosen"] == 0 and learned[2]["rewards/chosen"] != 0


def test_a_batch_of_pairs_must_be_announced(tmp_path: Path) -> None:
    """TRL runs chosen and rejected as one batch of twice the rows."""
    with pytest.raises(ContractError, match=r"rows of one micro-batch on one rank, 4; got 8; pass .*rows=8"):
        run(tmp_path, True, rows=None)

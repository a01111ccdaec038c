"""The finished model's folder in Hugging Face format, and the proof that it holds what was trained.

The folder loads in transformers without any code of ours. Every sampling value is written out in
``generation_config.json``, because an absent one means another default in each engine. Does not know the
loop.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from twodice.errors import CheckpointError
from twodice.text.store import TokenStore
from twodice.training.checkpoint import DISK
from twodice.training.models import load_folder, weights_of

# The largest difference of a logit between the trained model and the one loaded from the folder.
TOLERANCE = 1e-5


def export_model(
    model: torch.nn.Module, store: TokenStore, folder: Path, *, source: str | None, probe: torch.Tensor
) -> float:
    """Write `folder` whole or not at all, load it again, and return the largest difference of a logit.

    Parameters
    ----------
    model
        A transformers model; its weights are written as they are.
    store
        Holds the tokenizer's file.
    folder
        The target; one that is there is replaced.
    source
        Folder of the model that was fine-tuned, whose tokenizer's settings are taken over; None for a new
        model.
    probe
        Token ids of shape (rows, positions) for the comparison, on the CPU.

    Raises
    ------
    CheckpointError
        The disk refused, or the loaded model differs by more than `TOLERANCE`.
    """
    side = folder.with_name(f".{folder.name}.partial")
    old = folder.with_name(f".{folder.name}.old")
    end = store.end_of_document
    try:
        for leftover in (side, old):
            DISK.remove(leftover)
        side.mkdir(parents=True)
        weights = {k: v.detach().to("cpu", torch.float32).contiguous() for k, v in weights_of(model).items()}
        save_file(weights, str(side / "model.safetensors"), metadata={"format": "pt"})
        _write_json(side / "config.json", _model_config(model))
        _write_json(side / "generation_config.json", generation_settings(model, end))
        _write_tokenizer(store, side, source, end, int(probe.shape[1]), model)
        for path in [*side.iterdir(), side]:
            DISK.sync(path)
    except OSError as error:
        raise CheckpointError(f"cannot write the model's folder {folder}: {error}") from error
    difference = largest_difference(model, side, probe)
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"the model loaded from {side} must give the logits of the trained one to {TOLERANCE:g}; "
            f"the largest difference is {difference:g}; the folder is left for inspection"
        )
    if folder.exists():
        DISK.rename(folder, old)
    DISK.rename(side, folder)
    DISK.sync(folder.parent)
    DISK.remove(old)
    return difference


@torch.no_grad()
def largest_difference(model: torch.nn.Module, folder: Path, probe: torch.Tensor) -> float:
    """Largest absolute difference of a logit on `probe` between `model` and the one that transformers
    loads."""
    loaded = load_folder(folder).eval()
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    # On the CPU in float32, whatever the training's device and arithmetic were.
    model.to("cpu")
    try:
        ours = model(input_ids=probe, use_cache=False).logits
        theirs = loaded(input_ids=probe, use_cache=False).logits
    finally:
        model.to(device)
        model.train(was_training)
    return float((ours.float() - theirs.float()).abs().max())


def _model_config(model: torch.nn.Module) -> dict[str, Any]:
    config: Any = model.config
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    # What names code or a path outside the folder does not belong in it.
    for name in ("auto_map", "_name_or_path", "_attn_implementation", "_attn_implementation_autoset"):
        values.pop(name, None)
    values["architectures"] = [type(model).__name__]
    values["dtype"] = "float32"
    return values


def generation_settings(model: torch.nn.Module, end: int) -> dict[str, Any]:
    """Every sampling value, each at the value that changes nothing, and the tokens that begin and end a
    text."""
    config: Any = model.config
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    kept = {name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        **{
            name: (end if value is None and name != "pad_token_id" else value) for name, value in kept.items()
        },
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "typical_p": 1.0,
        "epsilon_cutoff": 0.0,
        "eta_cutoff": 0.0,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "num_beams": 1,
        "num_return_sequences": 1,
        "max_length": longest,
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_tokenizer(
    store: TokenStore, folder: Path, source: str | None, end: int, context: int, model: torch.nn.Module
) -> None:
    shutil.copyfile(store.tokenizer_file, folder / "tokenizer.json")
    if source is not None and (Path(source) / "tokenizer_config.json").is_file():
        # The files of the model that was fine-tuned, as they are; a class of their own or code is not taken
        # over.
        values = json.loads((Path(source) / "tokenizer_config.json").read_text(encoding="utf-8"))
        values.pop("auto_map", None)
        for name in ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja"):
            if (Path(source) / name).is_file():
                shutil.copyfile(Path(source) / name, folder / name)
        _write_json(folder / "tokenizer_config.json", values)
        return
    config: Any = model.config
    text = store.tokenizer.inner.id_to_token(end)
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": getattr(config, "max_position_embeddings", None) or context,
        "bos_token": text,
        "eos_token": text,
        "unk_token": None,
        "pad_token": None,
    }
    _write_json(folder / "tokenizer_config.json", values)

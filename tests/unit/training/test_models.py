"""The presets, the folders that are fine-tuned, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from twodice.errors import ConfigError
from twodice.training.models import model_facts, own_rates, put_weights, read_folder_config, weights_of
from twodice.training.presets import PRESETS, preset_config

# Parameters in millions with a vocabulary of this size, tied ones once: nano about 1, micro about 8, small 25
# to 120.
SIZES = {
    "gpt2-pico": (1024, 0.4, 0.6), "gpt2-nano": (1024, 0.8, 1.2), "llama-nano": (1024, 0.8, 1.2),
    "gpt2-micro": (2048, 7, 9), "llama-micro": (2048, 7, 9),
    "gpt2-small": (32768, 100, 120), "llama-small": (8192, 25, 30),
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_its_size_tied_embeddings_and_no_dropout_of_its_own(name: str) -> None:
    from transformers import AutoModelForCausalLM

    vocabulary, low, high = SIZES[name]
    config = preset_config(name, vocabulary=vocabulary, context=PRESETS[name].context, end_of_text=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    assert low <= sum(p.numel() for p in model.parameters()) / 1e6 <= high
    assert own_rates(config) == {} and config.tie_word_embeddings
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_own_rates_are_found_in_nested_configs_too() -> None:
    from transformers import GPT2Config

    config = GPT2Config(resid_pdrop=0.1, embd_pdrop=0.0, attn_pdrop=0.2, summary_first_dropout=0.0)
    assert own_rates(config) == {"resid_pdrop": 0.1, "attn_pdrop": 0.2}
    config.text_config = GPT2Config(
        resid_pdrop=0.3, embd_pdrop=0.0, attn_pdrop=0.0, summary_first_dropout=0.0
    )
    assert own_rates(config)["text_config.resid_pdrop"] == 0.3


def test_an_unknown_model_is_refused_with_the_nearest_preset(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'llama-micro'"):
        model_facts("lama-micro")


def test_weights_that_are_not_safetensors_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(ConfigError, match="safetensors only"):
        model_facts(str(tmp_path))
    (tmp_path / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"must hold config\.json"):
        model_facts(str(tmp_path))


def test_code_in_a_models_folder_is_never_run(tmp_path: Path) -> None:
    """The folder's code would leave a file behind."""
    mark = tmp_path / "was-run"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "configuration_evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass EvilConfig: pass\n")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "configuration_evil.EvilConfig"}})
    )
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="without code from the folder"):
        read_folder_config(folder)
    assert not mark.exists()


def test_weights_are_copied_in_place_and_buffers_that_last_are_among_them() -> None:
    class Small(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Linear(2, 2, bias=False)
            self.two = torch.nn.Linear(2, 2, bias=False)
            self.two.weight = self.one.weight
            self.register_buffer("lasting", torch.ones(1))
            self.register_buffer("passing", torch.ones(1), persistent=False)

    model = Small()
    assert set(weights_of(model)) == {"one.weight", "lasting"}
    place = model.one.weight.data_ptr()
    put_weights(model, {"one.weight": torch.full((2, 2), 3.0), "lasting": torch.zeros(1)})
    assert (
        model.two.weight.data_ptr() == place
        and bool((model.two.weight == 3).all())
        and float(model.lasting) == 0
    )

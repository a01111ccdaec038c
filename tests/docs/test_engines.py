"""The page on other engines: what it shows is what comes out, and it names every profile."""

from __future__ import annotations

import doctest
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import twodice
from twodice import SamplingParams, sample
from twodice.sampling import translate
from twodice.sampling.profiles import PROFILES

PAGE = Path(__file__).parents[2] / "docs" / "engines.md"


def test_what_the_page_and_translate_show_comes_out() -> None:
    text = PAGE.read_text("utf-8")
    shown = doctest.DocTestParser().get_doctest(text.replace("```", ""), {}, "engines", str(PAGE), 0)
    assert len(shown.examples) >= 6
    assert doctest.DocTestRunner().run(shown).failed == 0
    assert doctest.testmod(translate) == (0, 2)


def test_what_the_page_does_inside_transformers_draws_as_sample_does() -> None:
    block = PAGE.read_text("utf-8").split("## Inside transformers")[1].split("```python\n")[1].split("```")[0]
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=40, n_positions=32, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=None
        )
    ).eval()
    given = {
        "twodice": twodice, "SamplingParams": SamplingParams, "model": model,
        "prompts": ["w3 w4 w5", "w7"],
        "tokenizer": PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w0"),
    }  # fmt: skip
    model.generation_config.update(max_new_tokens=3, pad_token_id=0)
    exec(block.replace("model.generate(", "made = model.generate("), given)
    assert given["made"].shape == (8, 6)
    with torch.no_grad():
        for j, length in ((0, 3), (3, 3), (4, 1), (7, 1)):
            text = given["made"][j, 3 - length :]
            logits = model(text[None, :length]).logits[:, -1]
            params = SamplingParams(top_p=0.9, seed=7)
            assert int(sample(logits, params, length, completion=j % 4).tokens) == int(text[length])


def test_the_page_speaks_of_every_profile() -> None:
    assert all(f"**{name}**" in PAGE.read_text("utf-8") for name in PROFILES)

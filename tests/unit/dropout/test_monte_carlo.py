"""Monte Carlo dropout: fixed networks, whatever the batch and however many run in one pass."""

from __future__ import annotations

import math

import pytest
import torch
from tests.support.model_zoo import ZOO
from tests.support.tiny_models import ALL_KINDS, tiny_model, tokens
from torch import nn

import twodice
from twodice.dropout.sites import find
from twodice.errors import ConfigError, ContractError

LAX = {"rtol": 1e-4, "atol": 1e-5}


def test_draws_do_not_depend_on_the_batch_or_on_how_many_share_a_pass() -> None:
    model = tiny_model("llama").eval()
    handle = twodice.attach(model, ALL_KINDS + ", head=0.2", seed=3)
    ids = tokens()
    whole = handle.monte_carlo(model, {"input_ids": ids}, 6)
    together = handle.monte_carlo(model, {"input_ids": ids}, 6, per_pass=4)
    alone = handle.monte_carlo(model, {"input_ids": ids[2:3]}, 6, per_pass=3)
    assert whole.mean.shape == (8, 12, 61) and whole.entropy.shape == (8, 12)
    assert torch.allclose(whole.mean.sum(-1), torch.ones(8, 12), atol=1e-5)
    for name in ("mean", "entropy", "mutual_information"):
        assert torch.allclose(getattr(whole, name), getattr(together, name), **LAX), name
        assert torch.allclose(getattr(whole, name)[2:3], getattr(alone, name), **LAX), name
    assert (whole.mutual_information > 0).all()


@pytest.mark.parametrize(
    "name", ["OPT", "Mixtral", "DeepSeek-V3", "ALBERT", "T5", "Whisper", "nn.Transformer", "nn.LSTM"]
)
def test_draws_share_a_pass_at_flattened_rows_experts_and_stand_ins(name: str) -> None:
    model, batch = ZOO[name]()
    kinds = [kind for kind in find(model).kinds if kind not in ("weight", "dropout")] or ["dropout"]
    handle = twodice.attach(model, ", ".join(f"{kind}=0.2" for kind in kinds), seed=3)
    one = {n: v[1:2] if isinstance(v, torch.Tensor) else v for n, v in batch.items()}
    whole, together, alone = (
        handle.monte_carlo(model, given, 4, per_pass=n, logits=lambda result: result["logits"])
        for given, n in ((batch, 1), (batch, 3), (one, 4))
    )
    torch.testing.assert_close(together.mean, whole.mean, **LAX)
    torch.testing.assert_close(alone.mean, whole.mean[1:2], **LAX)
    assert (whole.mutual_information > 0).any()


def test_entropy_and_mutual_information_are_those_of_two_known_networks() -> None:
    """One unit that is kept or dropped: the distribution is (s, 1 - s) or (1/2, 1/2)."""
    model = nn.Sequential(nn.Dropout(0.0), nn.Linear(1, 2, bias=False))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0], [-1.0]]))
    handle = twodice.attach(model, "dropout=0.5", seed=1)
    draws = 64
    found = handle.monte_carlo(model, torch.ones(1, 1), draws)
    key = twodice.Key(1).child("monte-carlo", "0#dropout", 0)
    kept = [
        bool(twodice.dropout(torch.ones(1, 1), 0.5, key=key, step=k, layout="bc", examples=[0]).any())
        for k in range(draws)
    ]
    assert 0 < sum(kept) < draws
    s = 1 / (1 + math.exp(-4))  # logits +2 and -2, as the kept unit is scaled by 2
    share = sum(kept) / draws
    mean = share * s + (1 - share) / 2

    def entropy(p: float) -> float:
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    expected = share * entropy(s) + (1 - share) * math.log(2)
    assert found.mean[0, 0].item() == pytest.approx(mean, abs=1e-6)
    assert found.entropy.item() == pytest.approx(entropy(mean), abs=1e-6)
    assert found.mutual_information.item() == pytest.approx(entropy(mean) - expected, abs=1e-6)


def test_the_model_is_in_its_mode_again_and_its_own_dropout_was_off() -> None:
    model = tiny_model(resid_pdrop=0.5).train()
    handle = twodice.attach(model, "embedding=0.2", seed=2)
    first = handle.monte_carlo(model, {"input_ids": tokens()}, 3)
    again = handle.monte_carlo(model, {"input_ids": tokens()}, 3)
    assert torch.equal(first.mean, again.mean)
    assert model.training and all(m.training for m in model.modules())


def test_what_cannot_be_drawn_is_refused() -> None:
    model = tiny_model("llama")
    handle = twodice.attach(model, "weight=0.1", seed=2)
    with pytest.raises(ConfigError, match="per_pass=1"):
        handle.monte_carlo(model, {"input_ids": tokens()}, 4, per_pass=2)
    handle.monte_carlo(model, {"input_ids": tokens()}, 2)
    with pytest.raises(ConfigError, match="draws must be"):
        handle.monte_carlo(model, {"input_ids": tokens()}, 0)
    with handle.step(0), pytest.raises(ContractError, match="inside a step"):
        handle.monte_carlo(model, {"input_ids": tokens()}, 2)
    handle.detach()
    with pytest.raises(ContractError, match="detached"):
        handle.monte_carlo(model, {"input_ids": tokens()}, 2)

"""What arrives in another form than usual, and what the cache of packed settings may hold."""

from __future__ import annotations

import pytest
import torch

from twodice.errors import ConfigError, ShapeError
from twodice.kernels import dispatch
from twodice.sampling.chain import Packs
from twodice.sampling.formats import from_generation_config
from twodice.sampling.params import SamplingParams
from twodice.sampling.sample import sample

PLAIN = SamplingParams(seed=0)


def test_a_mask_of_another_device_is_not_read_as_an_address() -> None:
    # "meta" stands for a GPU here: its address is 0, which the kernel takes as no mask at all.
    mask = torch.zeros(1, 1, dtype=torch.int32, device="meta")
    with pytest.raises(ShapeError, match=r"allowed_mask must have values; .* 'meta'"):
        sample(torch.zeros(1, 4), PLAIN, 0, allowed_mask=mask)


def test_a_view_that_is_still_to_be_negated() -> None:
    view = torch.complex(torch.zeros(1, 4), torch.tensor([[1.0, 5.0, 2.0, 3.0]])).conj().imag
    assert view.is_neg()
    assert sample(view, SamplingParams(temperature=0), 0).tokens.tolist() == [0]
    state = torch.complex(*torch.tensor([[0.0], [-5.0]], dtype=torch.float64)).conj().imag
    found = sample(view, SamplingParams(mirostat_tau=2.0, mirostat_eta=0.0, seed=0), 0, state=state)
    assert state.is_neg() and found.state is not None and found.state.tolist() == [5.0]


@pytest.mark.parametrize("compiled", [True, False])
def test_no_result_carries_a_gradient(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        monkeypatch.setattr(dispatch, "native", None)
    logits, state = torch.zeros(1, 4, requires_grad=True), torch.tensor([3.0], requires_grad=True)
    found = sample(
        logits, SamplingParams(mirostat_tau=2, seed=0), 0, state=state, need=("logprob", "entropy")
    )
    for value in (found.logprob, found.entropy, found.state):
        assert value is not None and not value.requires_grad


def test_lists_of_no_rows() -> None:
    found = sample(torch.zeros(0, 4), [], [], completion=[])
    assert found.tokens.shape == (0,)


@pytest.mark.parametrize("params", [None, {"top_k": 1}, ["top_k"], [PLAIN, None]])
def test_params_of_another_type_are_named(params: object) -> None:
    with pytest.raises(ConfigError, match="params must be one SamplingParams or one a row; got"):
        sample(torch.zeros(2, 4), params, 0)  # type: ignore[arg-type]


def test_packs_are_bounded_by_bytes_and_the_last_used_stay() -> None:
    packs = Packs(1 << 16)
    lists = [SamplingParams(allowed_tokens=range(i, i + 1600)) for i in range(4)]
    first = packs(lists[0])
    assert packs(lists[0]) is first and 24_000 < packs.held < 32_000
    second = packs(lists[1])
    assert packs(lists[0]) is first
    packs(lists[2])  # the second, used longest ago, goes
    assert packs.held <= packs.most
    assert packs(lists[0]) is first and packs(lists[1]) is not second
    everything = packs(SamplingParams(allowed_tokens=range(9000)))  # more than all room: served, not kept
    assert everything.settings.highest_id == 8999 and packs(lists[0]) is first
    large = SamplingParams(allowed_tokens=range(9000))
    assert packs(large) is not packs(large)  # nor as what came last


@pytest.mark.parametrize("n", [1, 2, 3, 7, 50, 199, 200, 201])
@pytest.mark.parametrize("kinds", [1, 2, 9])
def test_ngrams_of_every_length_by_comparing_every_place(n: int, kinds: int) -> None:
    generator = torch.Generator().manual_seed(100 * n + kinds)
    ids = torch.randint(0, kinds, (200,), generator=generator)
    ids = torch.cat([ids[:120], ids[:80]])  # a long repeat at the end
    seen = ids.tolist()
    start = seen[len(seen) - n + 1 :]
    banned = {seen[j + n - 1] for j in range(len(seen) - n + 1) if seen[j : j + n - 1] == start}
    history = (ids, torch.tensor([0, len(seen)]))
    params = SamplingParams(no_repeat_ngram_size=n, seed=0)
    found = sample(torch.zeros(1, 10), params, 0, history=history, need=("kept",))
    assert found.kept is not None
    assert set(range(10)) - set(found.kept[1].tolist()) == banned


def test_a_generation_config_that_asks_for_nothing_we_lack() -> None:
    asked = {"do_sample": True, "min_new_tokens": 0, "suppress_tokens": [], "sequence_bias": {}}
    assert from_generation_config(asked) == SamplingParams()
    with pytest.raises(ConfigError, match="forced_eos_token_id"):
        from_generation_config({"forced_eos_token_id": 0})


def test_equal_settings_of_other_objects_are_compared_once(monkeypatch: pytest.MonkeyPatch) -> None:
    packs = Packs(1 << 16)
    rows = lambda: tuple(SamplingParams(seed=i) for i in range(8))  # noqa: E731
    first = packs(rows())
    compared = []
    equal = SamplingParams.__eq__
    monkeypatch.setattr(
        SamplingParams, "__eq__", lambda self, other: compared.append(self) or equal(self, other)
    )
    others = rows()
    assert packs(others) is first and len(compared) == 8
    assert packs(tuple(others)) is packs(tuple(list(others))) is first and len(compared) == 8

"""`DropoutCallback` makes the dropout of a plan work inside the Hugging Face Trainer, with its own resume."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")

from tests.support.tiny_models import tiny_model, tokens
from tests.support.tiny_trainer import PLAN, tiny_trainer, weights
from transformers import TrainerCallback

import twodice
from twodice import DropoutCallback
from twodice.errors import ConfigError, ContractError, TwodiceError

RATES = "embedding=0.1, attention=0.1, residual=0.1, activation=0.1"


def trained(out: Path, *callbacks: Any, resume: bool | None = None, **settings: Any) -> Any:
    trainer = tiny_trainer(out, *callbacks, **settings)
    try:
        trainer.train(resume_from_checkpoint=resume)
    except TwodiceError:
        for callback in callbacks:
            callback.close()  # a model that stays attached makes others of its seed warn
        raise
    return trainer


def test_killed_runs_end_with_the_bits_of_one_that_was_not(tmp_path: Path) -> None:
    """SIGKILL at moments drawn by key after the first checkpoint; accumulation, short last batches, a
    schedule that follows the validation loss; Llama with activation checkpointing.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.killed_trainers", str(tmp_path), "2"],
        capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for family, found in json.loads(done.stdout.splitlines()[-1]).items():
        assert found["equal"], (family, found)
        assert len(found["resumed"]) == 2 and found["resumed"][0] >= 2, (family, found)


class CountsAnew(DropoutCallback):
    """Saboteur: the number of the step is how many this process has run, the trap of a counter."""

    count = -1

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.count += 1
        super().on_step_begin(args, SimpleNamespace(global_step=self.count), control, **kwargs)


@pytest.mark.parametrize("kind", [DropoutCallback, CountsAnew])
def test_a_resumed_run_has_the_rest_of_the_masks_and_a_counter_would_be_found_out(
    kind: Any, tmp_path: Path
) -> None:
    whole = trained(tmp_path, kind(PLAN, seed=5))
    for later in ("checkpoint-4", "checkpoint-6"):
        (tmp_path / later).rename(tmp_path / f"was-{later}")
    again = trained(tmp_path, kind(PLAN, seed=5), resume=True)
    assert torch.equal(weights(again.model), weights(whole.model)) == (kind is DropoutCallback)


def test_any_accumulation_has_the_same_masks(tmp_path: Path) -> None:
    """8 x 1, 4 x 2 and 1 x 8 end with weights that differ by the order of summation; without dropout, by far
    more.
    """
    settings = {"max_steps": 2, "rows": 16, "learning_rate": 1e-3, "eval_strategy": "no", "optim": "sgd"}
    ends = [
        weights(
            trained(
                tmp_path / f"{rows}", DropoutCallback(plan, seed=5),
                per_device_train_batch_size=rows, gradient_accumulation_steps=8 // rows, **settings,
            ).model
        )
        for rows, plan in ((8, RATES), (4, RATES), (1, RATES), (8, "residual=0"))
    ]  # fmt: skip
    start = weights(tiny_model())
    moved = float((ends[0] - start).abs().max())
    for other in ends[1:3]:
        assert float((other - ends[0]).abs().max()) < 1e-4 * moved
    assert float((ends[3] - ends[0]).abs().max()) > 1e-2 * moved


class CountsOwnRows(DropoutCallback):
    """Saboteur: each rank, and each micro-batch, counts its rows from 0."""

    def _enter(self, args: Any, state: Any) -> None:
        self._micro = 0
        super()._enter(SimpleNamespace(world_size=1, process_index=0), state)


def test_two_ranks_end_with_the_weights_of_one(tmp_path: Path) -> None:
    """2 x 2 rows, accumulated twice, on two processes (DDP, gloo) against 2 rows, four times, in one."""
    from safetensors.torch import load_file
    from tests.support.rank_trainers import work

    done = subprocess.run(
        [sys.executable, "-m", "tests.support.rank_trainers", str(tmp_path), "2"],
        capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    two = load_file(tmp_path / "end.safetensors")["all"]
    one, wrong = work(tmp_path, 1), work(tmp_path, 1, CountsOwnRows)
    moved = float((one - weights(tiny_model())).abs().max())
    assert float((two - one).abs().max()) < 1e-4 * moved
    assert float((wrong - one).abs().max()) > 1e-2 * moved


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(reentrant: bool, tmp_path: Path) -> None:
    plain = trained(tmp_path / "a", DropoutCallback(PLAN, seed=5), max_steps=2)
    kept = trained(
        tmp_path / "b", DropoutCallback(PLAN, seed=5), max_steps=2,
        activation_checkpointing=True,
        activation_checkpointing_kwargs={"use_reentrant": reentrant, "preserve_rng_state": False},
    )  # fmt: skip
    assert torch.equal(weights(plain.model), weights(kept.model))


class Looks(TrainerCallback):
    """Notes, at each evaluation, what the attached model generates and what its weights are."""

    def __init__(self) -> None:
        self.found: list[tuple[dict[str, torch.Tensor], torch.Tensor, float]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        made = model.eval().generate(tokens(2, 4), max_new_tokens=5, do_sample=False, pad_token_id=1)
        copied = {name: value.clone() for name, value in model.state_dict().items()}
        self.found.append((copied, made, kwargs["metrics"]["eval_loss"]))


def test_evaluation_and_generation_see_the_plain_model(tmp_path: Path) -> None:
    looks = Looks()
    trained(tmp_path, DropoutCallback(PLAN, seed=5), looks, max_steps=4, eval_on_start=True)
    assert len(looks.found) == 3
    plain = tiny_trainer(tmp_path)
    for state, made, loss in looks.found:
        plain.model.load_state_dict(state)
        assert plain.evaluate()["eval_loss"] == loss
        again = plain.model.eval().generate(tokens(2, 4), max_new_tokens=5, do_sample=False, pad_token_id=1)
        assert torch.equal(again, made)


class Rates(DropoutCallback):
    """Notes the thresholds in force in each step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.thresholds: dict[int, int] = {}

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_substep_end(args, state, control, **kwargs)
        assert self.handle is not None and self.handle._state.snapshot is not None
        self.thresholds[state.global_step] = self.handle._state.snapshot.thresholds[-1]


def test_a_schedule_that_follows_the_validation_loss_goes_on_after_a_resume(tmp_path: Path) -> None:
    """The losses before the checkpoint come from the log, so the rates are those of one run."""
    settings = {"max_steps": 8, "eval_steps": 1, "save_steps": 4}
    first, second = Rates("output=plateau(0.2, 0.5)"), Rates("output=plateau(0.2, 0.5)")
    whole = trained(tmp_path, first, **settings)
    losses = [entry["eval_loss"] for entry in whole.state.log_history if "eval_loss" in entry]
    assert len(set(first.thresholds.values())) > 1, f"the validation loss never rose: {losses}"
    (tmp_path / "checkpoint-8").rename(tmp_path / "was")
    again = trained(tmp_path, second, resume=True, **settings)
    assert {step: t for step, t in first.thresholds.items() if step >= 4} == second.thresholds
    assert torch.equal(weights(again.model), weights(whole.model))


def test_an_evaluation_without_the_loss_that_a_plan_follows_is_an_error(tmp_path: Path) -> None:
    plan = "output=plateau(0.2, 0.5)"
    with pytest.raises(ConfigError, match=r"follows 'eval_held_loss'.*got eval_loss"):
        trained(tmp_path, DropoutCallback(plan, metric="eval_held_loss"))
    with pytest.raises(ConfigError, match="eval_strategy='no'"):
        trained(tmp_path, DropoutCallback(plan), eval_strategy="no")


def test_the_model_is_what_it_was_after_training_and_its_checkpoints_are_plain(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    trainer = trained(tmp_path / "a", DropoutCallback(RATES), max_steps=2, eval_strategy="no")
    plain = trained(tmp_path / "b", max_steps=2, eval_strategy="no")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in trainer.model.modules())
    assert {*vars(trainer.model.transformer.h[0].attn)} == {*vars(plain.model.transformer.h[0].attn)}
    files = [load_file(tmp_path / run / "checkpoint-2" / "model.safetensors") for run in "ab"]
    assert [*files[0]] == [*files[1]]
    trainer.train()  # anew, with the same callback


def test_a_run_that_fails_can_be_begun_again_or_closed(tmp_path: Path) -> None:
    class Fails(TrainerCallback):
        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise RuntimeError("in the middle of a step")

    callback = DropoutCallback(RATES)
    trainer = tiny_trainer(tmp_path, callback, Fails(), eval_strategy="no")
    for _ in range(2):
        with pytest.raises(RuntimeError, match="in the middle"):
            trainer.train()
    callback.close()
    callback.close()
    assert callback.handle is None
    trainer.model.train()(tokens(2))  # plain again: no step is asked for


def test_what_is_not_served_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    state = SimpleNamespace(global_step=0)
    alone = {"n_gpu": 1, "parallelism_config": None}
    for args, message in (
        ({**alone, "n_gpu": 2}, "one device; got 2"),
        ({**alone, "parallelism_config": SimpleNamespace(tp_size=2)}, "got tp_size=2"),
        ({**alone, "parallelism_config": SimpleNamespace(tp_size=1, cp_size=4)}, "got cp_size=4"),
    ):
        with pytest.raises(ConfigError, match=message):
            DropoutCallback(RATES).on_train_begin(SimpleNamespace(**args), state, None, model=model)
    with pytest.raises(ConfigError, match="rows must be an integer of 1 or more; got 0"):
        DropoutCallback(RATES, rows=0)
    with pytest.raises(ConfigError):
        DropoutCallback("residul=0.1")
    handle = twodice.attach(model, RATES, seed=9)
    with pytest.raises(ContractError, match="attached once"):
        trained(tmp_path, DropoutCallback(RATES), model=model)
    handle.detach()


def test_a_checkpoint_of_another_plan_or_seed_is_refused_and_another_layout_is_not(tmp_path: Path) -> None:
    trained(tmp_path, DropoutCallback(RATES, seed=1), max_steps=2, eval_strategy="no")
    for callback, message in (
        (DropoutCallback(RATES, seed=2), r"there seed is 1; got 2"),
        (DropoutCallback("residual=0.2", seed=1), r"there plan is 'embedding=0.1"),
    ):
        with pytest.raises(ConfigError, match=message):
            trained(tmp_path, callback, resume=True, max_steps=4, eval_strategy="no")
    trained(
        tmp_path, DropoutCallback(RATES, seed=1), resume=True, max_steps=3, eval_strategy="no",
        per_device_train_batch_size=8, gradient_accumulation_steps=1,
    )  # fmt: skip


def test_a_checkpoint_from_before_the_callback_is_gone_on_from(tmp_path: Path) -> None:
    trained(tmp_path, max_steps=2, eval_strategy="no")
    trained(tmp_path, DropoutCallback(RATES), resume=True, max_steps=4, eval_strategy="no")
    stored = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert stored["stateful_callbacks"]["DropoutCallback"]["args"]["plan"] == RATES


def test_a_forward_of_more_rows_than_a_micro_batch_is_an_error(tmp_path: Path) -> None:
    """Its slots would be those of the next micro-batch too."""
    with pytest.raises(ContractError, match=r"at most the rows.*, 2; got 4; pass .*rows=4\)"):
        trained(tmp_path, DropoutCallback(RATES, rows=2))


def test_training_with_compiled_code_has_the_masks_of_eager(tmp_path: Path) -> None:
    settings = {"max_steps": 2, "eval_strategy": "no", "learning_rate": 1e-3, "optim": "sgd", "rows": 16}
    plain = trained(tmp_path / "a", DropoutCallback(RATES), **settings)
    fast = trained(tmp_path / "b", DropoutCallback(RATES), torch_compile_backend="aot_eager", **settings)
    other = trained(tmp_path / "c", DropoutCallback(RATES, seed=1), **settings)
    torch._dynamo.reset()
    near, far = (float((weights(t.model) - weights(plain.model)).abs().max()) for t in (fast, other))
    assert near < 1e-4 * far


def test_adapters_are_trained_under_the_plan_and_resumed(tmp_path: Path) -> None:
    """LoRA on Llama, whose frozen layers drop too, at sites of the names that they have without adapters."""
    peft = pytest.importorskip("peft", reason="adapters need peft")

    def adapted() -> Any:
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.0)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return peft.get_peft_model(tiny_model("llama"), config)

    settings = {"max_steps": 4, "eval_strategy": "no", "activation_checkpointing": True}
    names: list[set[str]] = []

    class Names(DropoutCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_train_begin(args, state, control, **kwargs)
            names.append({site.name for site in self.handle._state.sites})

    whole = trained(tmp_path, Names(RATES), model=adapted(), **settings)
    plain = trained(tmp_path / "plain", Names("residual=0"), model=adapted(), **settings)
    trained(tmp_path / "bare", Names(RATES), family="llama", **settings)
    (tmp_path / "checkpoint-4").rename(tmp_path / "was")
    again = trained(tmp_path, Names(RATES), model=adapted(), resume=True, **settings)
    assert names[0] == names[2] and len(names[0]) == 9
    assert torch.equal(weights(again.model), weights(whole.model))
    assert not torch.equal(weights(plain.model), weights(whole.model))

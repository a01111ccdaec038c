"""Fine-tune a Llama by LoRA adapters with residual dropout: the adapters' own dropout is a site like any other.

Trains the same few steps twice, with the batch of 8 in one piece and in four, and compares what the adapters
have become; then the same with the dropout that peft brings, whose masks come from torch's generator.
Needs peft. Run: python examples/lora_dropout.py   (seconds; the model is made from a config, with no weights)
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import twodice

STEPS, BATCH = 5, 8
ids = torch.arange(STEPS * BATCH * 32).reshape(STEPS, BATCH, 32) * 37 % 251


def adapted() -> torch.nn.Module:
    """A frozen Llama with adapters; the same weights at each call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules=["q_proj", "v_proj", "down_proj"])
    return get_peft_model(LlamaForCausalLM(config), lora).train()


def fine_tune(plan: str, rows_at_a_time: int) -> torch.Tensor:
    """The weights of the adapters after a few steps, with each batch cut into pieces of that many rows."""
    model = adapted()
    handle = twodice.attach(model, plan, seed=7)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for step in range(STEPS):
        for rows in torch.arange(BATCH).split(rows_at_a_time):
            with handle.step(step, examples=rows):
                batch = ids[step, rows]
                loss = model(input_ids=batch, labels=batch).loss * len(rows) / BATCH
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    handle.detach()
    return torch.cat([p.detach().flatten() for p in trained])


model = adapted()
handle = twodice.attach(model, "residual=0.1, dropout=0.2", seed=7)
sites = [record.site for record in handle.audit().sites if record.source == "plan"]
print("sites of layer 0:", *(site for site in sites if ".layers.0." in site), sep="\n  ")
assert sum("lora_dropout" in site for site in sites) == 6, "one for each adapter: 3 in each of 2 layers"
handle.detach()
start = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])

with_plan = "residual=0.1, dropout=0.2"  # `dropout` reaches every nn.Dropout that the model calls: peft's
whole, pieces = fine_tune(with_plan, 8), fine_tune(with_plan, 2)
keyed, moved = float((whole - pieces).abs().max()), float((whole - start).abs().max())
print(f"training has moved the adapters' weights by up to {moved:.1e}")
print(f"adapters' dropout in the plan:  1 x 8 against 4 x 2 rows, largest difference {keyed:.1e}")

left_alone = "residual=0.1"  # the plan does not speak of the adapters' dropout, so it stays what it was
whole, pieces = fine_tune(left_alone, 8), fine_tune(left_alone, 2)
drawn = float((whole - pieces).abs().max())
print(f"left to torch's generator:      1 x 8 against 4 x 2 rows, largest difference {drawn:.1e}")
assert keyed < 1e-5 < drawn and moved > 1e-3

"""Fine-tune a Llama by LoRA adapters, with residual dropout and the adapters' own dropout in one plan.

A Llama has no place for residual dropout, and peft's draws from torch's generator. In a plan both are sites:
the batch of 8 whole and in four pieces trains the same adapters. Left to the generator it does not.
Needs peft. Run: python examples/lora_dropout.py   (seconds; the model is made from a config)
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import twodice

STEPS, BATCH = 5, 8
ids = torch.arange(STEPS * BATCH * 32).reshape(STEPS, BATCH, 32) * 37 % 251


def fine_tune(plan: str, rows_at_a_time: int, show: bool = False) -> torch.Tensor:
    """Return the adapters after a few steps, each batch cut into pieces of that many rows."""
    torch.manual_seed(0)  # the same weights each time; the masks of the plan ask no generator
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.2, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(LlamaForCausalLM(config), lora).train()
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(adapters, lr=0.5)
    handle = twodice.attach(model, plan, seed=7)
    if show:
        print(*(record.site for record in handle.audit().live if record.layer in (None, 0)), sep="\n")
    for step in range(STEPS):
        for rows in torch.arange(BATCH).split(rows_at_a_time):
            with handle.step(step, examples=rows):
                loss = model(input_ids=ids[step, rows], labels=ids[step, rows]).loss
                (loss * len(rows) / BATCH).backward()
        optimizer.step()
        optimizer.zero_grad()
    handle.detach()
    return torch.cat([p.detach().flatten() for p in adapters])


both = "residual=0.1, dropout=0.2"  # `dropout` is every nn.Dropout that the model calls: here peft's
in_plan = (fine_tune(both, 8, show=True) - fine_tune(both, 2)).abs().max().item()
left_alone = (fine_tune("residual=0.1", 8) - fine_tune("residual=0.1", 2)).abs().max().item()
print(f"8 rows at once against 2: the adapters differ by {in_plan:.0e} with their dropout in the plan,")
print(f"by {left_alone:.0e} with it left to torch's generator")
assert in_plan < 1e-5 < 1e-3 < left_alone

"""One batch of eight, or four times two: with keyed dropout the gradient is the same.

Puts dropout into a Llama (which has no place for it) from outside, trains one step both ways, and takes it
out again.
Run: python examples/same_masks.py
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import twodice

config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
)
model = LlamaForCausalLM(config).train()
handle = twodice.attach(model, "embedding=0.1, attention=0.1, residual=0.1, activation=0.2", seed=7)
print(handle.audit())

ids = torch.arange(8 * 32).reshape(8, 32) * 37 % 256


def gradient(rows_at_a_time: int) -> torch.Tensor:
    """Gradient of the summed loss at step 3, with the batch cut into pieces of that many rows."""
    model.zero_grad()
    for rows in torch.arange(8).split(rows_at_a_time):
        with handle.step(3, examples=rows):  # the masks are a function of step, example, position and column
            logits = model(input_ids=ids[rows]).logits
        torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), ids[rows, 1:].flatten(), reduction="sum"
        ).backward()
    return model.model.layers[0].mlp.down_proj.weight.grad.clone()


whole, pieces = gradient(8), gradient(2)
print("largest difference between the two gradients:", float((whole - pieces).abs().max()))
assert torch.allclose(whole, pieces, rtol=1e-4, atol=1e-4)

handle.detach()
model.eval()  # and the model is exactly what it was

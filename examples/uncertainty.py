"""Monte Carlo dropout: where a model was not trained, its draws disagree.

Trains a tiny GPT-2 to count by 1 to 5 (modulo 64) from starts below 48, then asks it about sequences of that
kind, about other starts, other steps, and no rule at all. Mutual information, what the draws disagree on, is
higher there; beside the loss it is still far too calm: it is no probability of being wrong.
Run: python examples/uncertainty.py   (some seconds)
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import twodice

M, T, DRAWS = 64, 12, 32


def counting(starts: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Sequences (B, T) that count from each start by each step."""
    return (starts[:, None] + by[:, None] * torch.arange(T)) % M


torch.manual_seed(0)
config = GPT2Config(
    vocab_size=M, n_embd=64, n_layer=2, n_head=4, n_positions=T, bos_token_id=0, eos_token_id=0,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip
model = GPT2LMHeadModel(config).train()
handle = twodice.attach(model, "residual=0.1, activation=0.1", seed=1)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
slots = torch.arange(64)
for step in range(300):
    ids = counting((step * 37 + slots * 11) % 48, 1 + (step + slots) % 5)
    with handle.step(step, examples=slots):
        model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

held = torch.arange(48, 64)
asked = {
    "as trained": counting(held - 32, 1 + held % 5),
    "from other starts": counting(held, 1 + held % 5),
    "by other steps": counting(held, 20 + held % 5),
    "no rule": (held[:, None] * 29 + torch.arange(T) ** 3 * 7 + torch.arange(T) ** 2) % M,
}
print(f"{DRAWS} draws; nats a token, from the fourth on\n{'':18} {'loss':>6} {'entropy':>8} {'disagree':>9}")
disagree = {}
for name, ids in asked.items():
    found = handle.monte_carlo(model, {"input_ids": ids}, DRAWS, per_pass=8)
    loss = -found.mean[:, 3:-1].gather(-1, ids[:, 4:, None]).log().mean()
    disagree[name] = found.mutual_information[:, 3:].mean().item()
    print(f"{name:18} {loss:6.2f} {found.entropy[:, 3:].mean():8.3f} {disagree[name]:9.4f}")
assert all(disagree["as trained"] < other for name, other in disagree.items() if name != "as trained")

# A draw is one thinned net: it does not depend on the batch, or on how many draws run in one pass.
alone = handle.monte_carlo(model, {"input_ids": asked["no rule"][5:6]}, DRAWS, per_pass=DRAWS)
print(f"one sequence alone or among sixteen: {(alone.mean[0] - found.mean[5]).abs().max():.0e} apart")
torch.testing.assert_close(alone.mean[0], found.mean[5], rtol=0, atol=1e-4)
handle.detach()

"""Monte Carlo dropout: where a model was not trained, its draws disagree.

Trains a tiny GPT-2 to count by 1 to 5 (modulo 64), then asks it about sequences of training, about the same rule
from starts that it has not seen, about steps that it has not seen, and about no rule at all. Mutual information is
what the draws disagree on; read it beside the loss: higher off the training data, and still far too calm there.
Run: python examples/uncertainty.py   (some seconds)
"""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import twodice

M, T, STEPS, DRAWS = 64, 12, 300, 32
torch.manual_seed(0)


def counting(starts: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Sequences (B, T) that count from each start by each step."""
    return (starts[:, None] + by[:, None] * torch.arange(T)) % M


config = GPT2Config(
    vocab_size=M, n_embd=64, n_layer=2, n_head=4, n_positions=T, bos_token_id=0, eos_token_id=0,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
)  # fmt: skip
model = GPT2LMHeadModel(config).train()
handle = twodice.attach(model, "residual=0.1, activation=0.1", seed=1)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(STEPS):
    slots = torch.arange(64)
    starts = (step * 37 + slots * 11) % 48  # never from 48 to 63: those are for the test
    ids = counting(starts, 1 + (step + slots) % 5)
    with handle.step(step, examples=slots):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
    optimizer.step()
    optimizer.zero_grad()
print(f"loss at the last step, in train mode: {loss.item():.3f} nats per token")

held = torch.arange(48, 64)
asked = {
    "as trained": counting(held - 32, 1 + held % 5),
    "by 1 to 5, from other starts": counting(held, 1 + held % 5),
    "by 6 to 10": counting(held, 6 + held % 5),
    "by 20 to 24": counting(held, 20 + held % 5),
    "no rule": (held[:, None] * 29 + torch.arange(T) ** 3 * 7 + torch.arange(T) ** 2) % M,
}
print(f"\n{DRAWS} draws of masks; nats, mean over the tokens from the fourth on")
print(f"{'':30} {'loss':>7} {'entropy':>8} {'mutual information':>19}")
disagree = {}
for name, ids in asked.items():
    found = handle.monte_carlo(model, {"input_ids": ids}, DRAWS, per_pass=8)
    loss = -found.mean[:, 3:-1].gather(-1, ids[:, 4:, None]).log().mean()
    disagree[name] = float(found.mutual_information[:, 3:].mean())
    print(f"{name:30} {loss:7.3f} {found.entropy[:, 3:].mean():8.3f} {disagree[name]:19.4f}")

trained = disagree.pop("as trained")
assert trained < min(disagree.values()), "the draws agree most on what was trained"
off = (disagree["by 6 to 10"] + disagree["by 20 to 24"] + disagree["no rule"]) / 3
print(f"\noff the training data the draws disagree {off / trained:.1f} times as much")

alone = handle.monte_carlo(model, {"input_ids": asked["no rule"][5:6]}, DRAWS)
together = handle.monte_carlo(model, {"input_ids": asked["no rule"]}, DRAWS, per_pass=DRAWS)
difference = float((alone.mean[0] - together.mean[5]).abs().max())
print(
    f"one sequence alone or among sixteen, a draw a pass or all in one: largest difference {difference:.0e}"
)
assert difference < 1e-4
handle.detach()

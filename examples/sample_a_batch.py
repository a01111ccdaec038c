"""One call, many requests: each row has its own settings, and its token does not depend on its neighbours.

Run: python examples/sample_a_batch.py
"""

import torch

import twodice
from twodice import SamplingParams

vocabulary = 50_257
ranks = torch.arange(vocabulary, dtype=torch.float32)
logits = torch.stack([torch.roll(-(ranks**0.5), shift) for shift in (0, 11, 222, 3333)])

requests = [
    SamplingParams(temperature=0.8, top_k=50, seed=1),
    SamplingParams(temperature=1.0, top_p=0.95, seed=2),
    SamplingParams(temperature=1.3, min_p=0.05, top_k=200, seed=3),
    SamplingParams(temperature=0.0),  # greedy: draws nothing
]
together = twodice.sample(logits, requests, position=12, need=("rank", "kept_mass", "logprob"))
print("tokens   ", together.tokens.tolist())
print("rank     ", together.rank.tolist())
print("mass kept", [round(mass, 4) for mass in together.kept_mass.tolist()])

alone = [
    twodice.sample(logits[row : row + 1], requests[row], position=12).tokens.item()
    for row in range(len(requests))
]
assert alone == together.tokens.tolist(), "a row's token is the same alone and among any neighbours"

backwards = twodice.sample(logits.flip(0), requests[::-1], position=12).tokens.flip(0)
assert backwards.tolist() == together.tokens.tolist(), "and at any place in the batch"
print("the same alone, together and in any order")

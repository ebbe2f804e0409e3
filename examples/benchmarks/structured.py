"""Queries and keys whose scores vary from block to block, as those of a trained model do.

A score is a sum of parts, each with a weight drawn for its query head: a kernel of the distance that favours near keys,
topics that change every few hundred tokens and come back, sinks in the first tokens of a sequence, and noise. Normal
random numbers alone make blocks that are all alike, of which a λ drops nothing or everything.
"""

import math
from typing import NamedTuple

import torch
from cases import Case
from peers import Data, make_data
from torch import Tensor

LOCAL, TOPIC, SINK = 5.0, 2.5, 5.0  # largest score of each part at a weight of 1; that of the noise has deviation 0.7
WEIGHTS = 0.2, 1.8
SPREADS = 32.0, 4096.0  # tokens over which the kernel of the distance falls
NUM_TOPICS, TOPIC_TOKENS, NUM_SINKS = 32, 256, 4


class Features(NamedTuple):
    """Unit vectors of each token, (total, dim): of a query and a key, their product is a part's score over its
    largest."""

    local: Tensor
    topic: Tensor
    sink_of_key: Tensor


def structured_data(case: Case, device: str, seed: int = 0) -> Data:
    """As `peers.make_data`; the first D / 2 + 1 dimensions of q and k are replaced."""
    data = make_data(case, device, seed)
    generator = torch.Generator(device).manual_seed(seed)
    features = token_features(case, generator)
    dims = [feature.shape[-1] for feature in features]
    parts = torch.cat(features, -1)
    data.k[..., : sum(dims)] = parts[:, None].to(data.k.dtype)
    parts[:, -1] = 1.0  # every query looks for the sinks
    largest = torch.tensor([LOCAL, TOPIC, SINK], device=device)
    weights = torch.empty(case.num_heads_q, 3, device=device).uniform_(*WEIGHTS, generator=generator) * largest
    weights = weights.repeat_interleave(torch.tensor(dims, device=device), -1) * math.sqrt(case.head_dim)
    data.q[..., : sum(dims)] = (parts[:, None] * weights).to(data.q.dtype)
    return data


def token_features(case: Case, generator: torch.Generator) -> Features:
    device, dim = generator.device, case.head_dim // 4
    positions = torch.cat([torch.arange(length, device=device) for length in case.lengths])
    spreads = torch.logspace(*(math.log10(spread) for spread in SPREADS), dim // 2, device=device)
    angles = positions[:, None] / spreads * torch.randn(dim // 2, generator=generator, device=device)
    local = torch.cat([angles.cos(), angles.sin()], -1) / math.sqrt(dim // 2)
    directions = torch.randn(NUM_TOPICS, dim, generator=generator, device=device)
    directions /= directions.norm(dim=-1, keepdim=True)
    stretches = max(case.lengths) // TOPIC_TOKENS + 1
    drawn = torch.randint(NUM_TOPICS, (stretches,), generator=generator, device=device)
    topic = directions[drawn[positions // TOPIC_TOKENS]]
    return Features(local, topic, (positions < NUM_SINKS).float()[:, None])

"""A Llama of random weights, and texts for it, whose scores are structured as those of structured.py are.

A few channels of the residual stream hold what decides: a constant, a mark of the first tokens, and the direction of
the token's topic. They come from the embedding, no layer writes to them, and the query and key projections of every
layer read them. The constant becomes a kernel of the distance by RoPE itself, in its pairs of middle frequency; topics
and sinks lie in the slowest pairs, which hardly turn over a context; what is left of a head is noise. Each query head
weighs the three parts differently. It is a stock Llama: nothing is hooked, every implementation sees the same q and k.
"""

import math

import torch
from structured import LOCAL, NUM_SINKS, NUM_TOPICS, SINK, SPREADS, TOPIC, TOPIC_TOKENS, WEIGHTS
from torch import Tensor
from transformers import LlamaForCausalLM

ROPE_THETA = 5e5  # of Llama 3
SLOW = 16384.0  # tokens in which a pair turns by a radian at most, to hold topics and sinks


def structured_ids(length: int, model: LlamaForCausalLM, generator: torch.Generator) -> Tensor:
    """A text (length,): NUM_SINKS tokens with which all begin, then stretches of TOPIC_TOKENS tokens on one topic."""
    words = model.config.vocab_size // NUM_TOPICS
    topics = torch.randint(NUM_TOPICS, (length // TOPIC_TOKENS + 1,), generator=generator, device=model.device)
    ids = topics.repeat_interleave(TOPIC_TOKENS)[:length]
    ids += NUM_TOPICS * torch.randint(1, words, (length,), generator=generator, device=model.device)
    ids[:NUM_SINKS] = torch.arange(NUM_SINKS, device=model.device)
    return ids


@torch.no_grad()
def give_structure(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    """Changes the weights of a model whose matrices are normal with a variance of 1 / hidden_size, in place.

    The topic of token t is t mod NUM_TOPICS; the first NUM_SINKS tokens have none.
    """
    config = model.config
    dim, half, hidden = config.head_dim, config.head_dim // 2, config.hidden_size
    tokens_per_radian = 1 / model.model.rotary_emb.inv_freq
    local = ((tokens_per_radian >= SPREADS[0]) & (tokens_per_radian <= SPREADS[1])).nonzero()[:, 0]
    slow = (tokens_per_radian > SLOW).nonzero()[:, 0]
    sink, topic = slow[-1:], torch.cat([slow[:-1], slow[:-1] + half])
    of_features = torch.cat([local, local + half, slow, slow + half])

    constant, mark, topics = 0, 1, slice(2, 2 + len(topic))  # channels
    channels = topics.stop
    amplitude = math.sqrt(hidden) / 8  # in them, beside 1 in all others
    embedding = model.model.embed_tokens.weight
    embedding.normal_(generator=generator)
    directions = torch.randn(NUM_TOPICS, len(topic), generator=generator, device=model.device)
    directions = directions / directions.norm(dim=-1, keepdim=True)
    ids = torch.arange(config.vocab_size, device=model.device)
    is_sink = ids < NUM_SINKS
    embedding[:, constant] = amplitude
    embedding[:, mark] = (is_sink * amplitude).to(embedding.dtype)
    embedding[:, topics] = (directions[ids % NUM_TOPICS] * ~is_sink[:, None] * amplitude).to(embedding.dtype)

    largest = torch.tensor([LOCAL, TOPIC, SINK], device=model.device) * math.sqrt(dim)
    for layer in model.model.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight *= (2 * config.num_hidden_layers) ** -0.5  # the stream keeps its size
            projection.weight[:channels] = 0
        weights = torch.empty(config.num_attention_heads, 3, device=model.device)
        weights = weights.uniform_(*WEIGHTS, generator=generator) * largest / amplitude
        by_head_q = layer.self_attn.q_proj.weight.view(-1, dim, hidden)
        by_head_k = layer.self_attn.k_proj.weight.view(-1, dim, hidden)
        for by_head in (by_head_q, by_head_k):
            by_head[:, :, :channels] = 0
            by_head[:, of_features] = 0
        by_head_q[:, local, constant] = (weights[:, :1] / len(local)).to(embedding.dtype)
        by_head_k[:, local, constant] = 1 / amplitude
        by_head_q[:, topic, torch.arange(channels, device=model.device)[topics]] = weights[:, 1:2].to(embedding.dtype)
        by_head_k[:, topic, torch.arange(channels, device=model.device)[topics]] = 1 / amplitude
        by_head_q[:, sink, constant] = weights[:, 2:].to(embedding.dtype)
        by_head_k[:, sink, mark] = 1 / amplitude

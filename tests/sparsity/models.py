"""Tiny models whose attention is sharp enough that blocks are dropped and kept, and the configurations for them."""

import torch
from torch import Tensor, nn

from tests.models.tiny import VOCABULARY, tiny_model

THRESHOLD = 0.3
LENGTH = 150
RUN = 12


def sharp_model(family: str = "llama", attention: str = "eager", **changes):
    """Queries and keys of trained models differ in size; here the queries' weights are made larger."""
    model = tiny_model(family, attention, max_position_embeddings=512, **changes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("q_proj.weight", "query.weight")):
                parameter *= 6
    return model


def tokens(length: int = LENGTH, rows: int = 2, seed: int = 0) -> Tensor:
    """Runs of one token: neighbouring rows agree about a block."""
    generator = torch.Generator().manual_seed(seed)
    runs = torch.randint(2, VOCABULARY, (rows, -(-length // RUN)), generator=generator)
    return runs.repeat_interleave(RUN, 1)[:, :length].contiguous()


def config_of(pattern="*attn*", calibration=None, **fields) -> dict:
    layer = {"br": 16, "bc": 16, "thresholds": {"prefill": [THRESHOLD], "decode": [THRESHOLD]}, **fields}
    calibrated = {} if calibration is None else {"calibration": calibration}
    return {"sparse_cfg": {pattern: layer, **calibrated}}


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Of a prefill, and of two decoding steps behind it."""
    prefill = model(ids[:, :-2], use_cache=True)
    parts, cache = [prefill.logits], prefill.past_key_values
    for token in ids[:, -2:].split(1, dim=1):
        step = model(token, past_key_values=cache, use_cache=True)
        parts.append(step.logits)
    return torch.cat(parts, dim=1)

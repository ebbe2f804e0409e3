"""Which kernels may run on a GPU: FA_OPS_KERNEL, read once, when fa_ops is imported.

"auto", the default: those written for the GPU at hand, where they know a call, and else the portable ones, in plain
Triton. "portable": the portable ones alone.
"""

import os
from collections.abc import Mapping

VARIABLE = "FA_OPS_KERNEL"
TIERS = ("auto", "portable")


def read_tier(environment: Mapping[str, str]) -> str:
    tier = environment.get(VARIABLE, "auto")
    if tier not in TIERS:
        raise ValueError(f"{VARIABLE}: {tier!r} given in the environment; accepted are {', '.join(map(repr, TIERS))}")
    return tier


TIER = read_tier(os.environ)

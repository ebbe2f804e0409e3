"""Which kernels may run on a GPU: FA_OPS_KERNEL, read once, when fa_ops is imported.

"portable", the default: those that have been run on one. "preview": also those that only compile for one so far.
"""

import os
from collections.abc import Mapping

VARIABLE = "FA_OPS_KERNEL"
TIERS = ("portable", "preview")


def read_tier(environment: Mapping[str, str]) -> str:
    tier = environment.get(VARIABLE, "portable")
    if tier not in TIERS:
        raise ValueError(
            f"{VARIABLE}: {tier!r} given in the environment; accepted are {' and '.join(map(repr, TIERS))}"
        )
    return tier


TIER = read_tier(os.environ)

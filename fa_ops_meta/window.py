"""The window of keys around a query, as every implementation takes it."""

UNLIMITED = 2**30  # keys on a side: no sequence has more


def window_bounds(is_causal: bool, window_left: int, window_right: int) -> tuple[int, int]:
    """(left, right): how many keys a query sees before and after its own position, -1 for all; causal is 0 after it.
    Wider windows than any sequence are cut, so that kernels can add positions to them in 32 bits."""
    return min(window_left, UNLIMITED), 0 if is_causal else min(window_right, UNLIMITED)

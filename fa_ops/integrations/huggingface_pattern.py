"""The mask tensor that travels from the mask function to the attention function, and how it is read there.

Between the two a mask is a tensor in other people's hands: models slice, join and expand it, `generate` makes it
before the model runs, hooks move it between devices. It must never be mistaken for another mask, and nobody else's mask
must be taken for it. So it is int64 (B or 1, pattern, rows, K or 1), and every element says what it belongs to:

- the number of the pattern, which is also the size of dimension 1, where it can be read without a device;
- the number of queries and the distance of the key from the last query, so that a cut, a join or a change of order
  shows;
- the row, counted from the last: of Q queries the mask has min(Q, 8) rows, of which the last stands for the last query,
  so that this one may be cut out, and any other cut shows;
- the state of the key: not written yet, hidden, or visible (in a packed batch: the first of its document).

The mask function also leaves what it knows on the tensor object. The attention function takes it from there, at no
cost, while the object is the same and nobody wrote into it. Of every other tensor it reads the elements, once for each.

A mask that is handed out and does not come back is noticed, too: where a model calls attention without a mask, while
one that hides keys waits for a call of these sizes and this configuration.
"""

import weakref
from typing import Any, NamedTuple

import torch
from torch import Tensor

ATTENTION_NAME = "modelopt_triton"

# Kinds of windows. Of W = config.sliding_window, a sliding one shows keys less than W before a query if causal, and up
# to W before and behind it if not; a centred one shows W keys around it.
NO_WINDOW, SLIDING, CENTRED = range(3)

# States of a key.
UNWRITTEN, HIDDEN, VISIBLE = range(3)

MOST_ROWS = 8

# Fields of an element, as shifts: the state has two bits; the number of queries is taken modulo 2 ** 24; the distance
# from the last query, above all others, is negative behind it, so MIDDLE is added.
ROW, NUMBER, QUERIES, DISTANCE = 2, 5, 10, 34
STATE_MASK, ROW_MASK, NUMBER_MASK, QUERIES_MASK = 3, 7, 31, (1 << 24) - 1
MIDDLE = 1 << 27

ATTRIBUTE = "_fa_ops_mask"  # of the tensor object: a `Known`

MOST_WAITING = 16
_waiting: list["Waiting"] = []


class MaskPattern(NamedTuple):
    """What all rows of a mask have in common.

    Attributes:
        is_causal: whether a query sees no key behind its own position.
        window: one of NO_WINDOW, SLIDING, CENTRED.
        hides_keys: whether some keys are hidden or not written, so that the mask has a value for each key.
        is_packed: whether rows hold several documents; the mask then tells where each begins.
    """

    is_causal: bool
    window: int = NO_WINDOW
    hides_keys: bool = False
    is_packed: bool = False

    @property
    def number(self) -> int:
        return PATTERNS.index(self) + 1

    @property
    def has_keys(self) -> bool:
        """Whether the mask has a value for each key."""
        return self.hides_keys or self.is_packed

    @property
    def is_aligned(self) -> bool:
        """Whether it matters where the queries stand among the keys."""
        return self.is_causal or self.window != NO_WINDOW

    def window_size(self, sliding_window: int) -> tuple[int, int]:
        """Keys that a query sees before and behind its own position."""
        if self.window == NO_WINDOW:
            return -1, -1
        if self.window == CENTRED:
            return (sliding_window - 1) // 2, sliding_window // 2
        return (sliding_window - 1, 0) if self.is_causal else (sliding_window, sliding_window)


# The commonest of those that have a value for each key have the smallest numbers, and so the smallest tensors.
PATTERNS = tuple(
    MaskPattern(is_causal, window, hides_keys, is_packed)
    for hides_keys, is_packed in ((True, False), (False, True), (False, False))
    for is_causal, window in (
        (True, NO_WINDOW), (True, SLIDING), (False, NO_WINDOW), (False, SLIDING), (False, CENTRED), (True, CENTRED),
    )
)  # fmt: skip


class KeyStates(NamedTuple):
    """What a mask says of the keys; None where it has no value for each.

    Attributes:
        visible: (B, K) bool, the keys to see; in a packed batch those where a document begins.
        written: (B, K) bool, the keys up to the last query's; None where that is all.
    """

    visible: Tensor | None
    written: Tensor | None = None


class Waiting(NamedTuple):
    """A mask that was handed out and that no attention has read yet."""

    mask: weakref.ref
    config: Any  # a weak reference, or None
    batch: int
    q_length: int
    kv_length: int


class Known(NamedTuple):
    """What the mask function knows of a mask without reading it."""

    pattern: MaskPattern
    states: KeyStates
    q_length: int
    kv_length: int
    version: int | None


def make_mask(
    pattern: MaskPattern,
    states: KeyStates,
    q_length: int,
    kv_length: int,
    last_key: int | Tensor,
    device: torch.device | str,
) -> Tensor:
    """The mask of a pattern and of its keys' states.

    Args:
        last_key: the key at the last query's position, an index among the keys; a 0-d tensor with a static cache.
    """
    if not torch.compiler.is_compiling() and torch.is_inference_mode_enabled():
        with torch.inference_mode(False):  # torch does not count writes into tensors that are made in it
            return make_mask(pattern, states, q_length, kv_length, last_key, device)
    head = (pattern.number << NUMBER) + ((q_length & QUERIES_MASK) << QUERIES)
    if pattern.has_keys:
        assert states.visible is not None
        key = torch.arange(MIDDLE << DISTANCE, (MIDDLE - kv_length) << DISTANCE, -1 << DISTANCE, device=device)
        code = states.visible[:, None, None] + (key + (head + (last_key << DISTANCE)))
        code = code + (HIDDEN if states.written is None else states.written[:, None, None])
    else:
        head += VISIBLE + ((MIDDLE + kv_length) << DISTANCE)
        code = torch.full((1, 1, 1, 1), head, dtype=torch.int64, device=device)
    if q_length != 1:
        code = code + torch.arange((_rows(q_length) - 1) << ROW, -1, -1 << ROW, device=device)[:, None]
    # `generate` makes masks for static caches contiguous, and a copy would not be known. Compiled code takes the states
    # for arguments, whose strides decide whether it is compiled again.
    mask = code.expand(-1, pattern.number, -1, -1).contiguous()
    states = KeyStates(*(None if state is None else state.contiguous() for state in states))
    _remember(mask, pattern, states, q_length, kv_length)
    return mask


def _rows(q_length: int) -> int:
    return min(q_length, MOST_ROWS)


def _remember(mask: Tensor, pattern: MaskPattern, states: KeyStates, q_length: int, kv_length: int) -> None:
    setattr(mask, ATTRIBUTE, Known(pattern, states, q_length, kv_length, _version(mask)))


def _version(mask: Tensor) -> int | None:
    """Counts writes into a tensor; None where torch does not, in inference mode and while tracing."""
    return None if torch.compiler.is_compiling() or mask.is_inference() else mask._version


def describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def pattern_of(mask: Tensor, batch: int, kv_length: int) -> MaskPattern | None:
    """The pattern that a mask's shape says it has; None for what is no mask of the mask function."""
    if mask.dtype != torch.int64 or mask.ndim != 4 or not 1 <= mask.shape[2] <= MOST_ROWS:
        return None
    # compared one by one: while tracing, the size may be symbolic, and what follows from it must not be
    for number, pattern in enumerate(PATTERNS, start=1):
        if mask.shape[1] == number:
            rows, keys = (batch, kv_length) if pattern.has_keys else (1, 1)
            return pattern if mask.shape[0] == rows and mask.shape[3] == keys else None
    return None


def read_mask(mask: Tensor, pattern: MaskPattern, q_length: int, kv_length: int) -> KeyStates:
    """What a mask of this pattern says of the keys, for a call of so many queries and keys.

    Raises NotImplementedError for a mask that somebody changed, or made for other queries or keys; on a GPU the device
    stops with an assertion where that takes reading the mask.
    """
    known: Known | None = getattr(mask, ATTRIBUTE, None)
    if known is not None and (torch.compiler.is_compiling() or known.version == _version(mask)):
        is_as_made = known.pattern == pattern and (
            not pattern.is_aligned or (known.q_length == q_length and known.kv_length == kv_length)
        )
        if not is_as_made:
            raise NotImplementedError(_changed(f"{q_length} queries and {kv_length} keys"))
        return known.states
    visible, written = torch.ops.modelopt.read_mask(mask, pattern.number, q_length, kv_length)
    if not pattern.has_keys and torch.compiler.is_compiling():
        torch._assert_async(visible.all(), ATTENTION_NAME)  # a compiler leaves out what nobody uses
    states = KeyStates(visible, written) if pattern.has_keys else KeyStates(None)
    if not torch.compiler.is_compiling():
        _remember(mask, pattern, states, q_length, kv_length)
    return states


def hand_out(mask: Tensor, config: Any) -> Tensor:
    """Remembers a mask that hides keys until attention reads it. Returns the mask."""
    known: Known = getattr(mask, ATTRIBUTE)
    if known.pattern.has_keys and config is not None:
        _waiting[:] = [w for w in _waiting if w.mask() is not None][-MOST_WAITING:]
        _waiting.append(Waiting(weakref.ref(mask), weakref.ref(config), mask.shape[0], known.q_length, known.kv_length))
    return mask


def has_waiting() -> bool:
    """Whether some mask may be waiting."""
    return bool(_waiting)


def take_back(config: Any, mask: Tensor | None, batch: int, q_length: int, kv_length: int) -> bool:
    """Notes that a module with this configuration calls attention. False for a call without a mask while a mask of the
    same sizes and configuration waits."""
    mine = [w for w in _waiting if w.config() is config and w.mask() is not None]
    if mask is None:
        return all(waiting[2:] != (batch, q_length, kv_length) for waiting in mine)
    _waiting[:] = [w for w in _waiting if w.config() is not config and w.mask() is not None]
    return True


def _changed(call: str) -> str:
    return (
        f"{ATTENTION_NAME}: attention_mask: for {call} it is not as the mask function made it: it was cut, joined, "
        "reordered, written into, or made for other queries or keys; accepted are rows of it in any order, and its "
        "last query alone"
    )


def _is_as_made(mask: Tensor, number: int, q_length: int, kv_length: int) -> Tensor:
    """(): whether all elements belong to a mask of this pattern for these queries and keys."""
    pattern, rows = PATTERNS[number - 1], mask.shape[2]
    last = mask[:, :, -1]
    state, row = last & STATE_MASK, (last >> ROW) & ROW_MASK
    is_ours = ((last >> NUMBER) & NUMBER_MASK == number) & (state <= VISIBLE) & (row == 0) & (last >= 0)
    is_ours &= last == last[:, :1]
    if not pattern.is_aligned:
        return is_ours.all()
    is_ours &= (
        mask == last[:, :, None] + torch.arange(rows - 1, -1, -1, device=mask.device)[:, None] * (1 << ROW)
    ).all(2)
    if rows != 1 or q_length != 1:
        is_ours &= (last >> QUERIES) & QUERIES_MASK == q_length & QUERIES_MASK
        is_ours &= torch.full_like(is_ours, rows == _rows(q_length))
    distance = (last >> DISTANCE) - MIDDLE
    if not pattern.has_keys:
        return (is_ours & (distance == kv_length)).all()
    follows = distance[..., :-1] - distance[..., 1:] == 1
    if q_length != 1 or pattern.window != NO_WINDOW:
        # no key is missing between the last one and the last query
        is_ours &= distance[..., -1:] <= 0
    return is_ours.all() & follows.all()


@torch.library.custom_op("modelopt::read_mask", mutates_args=())
def _read_mask(mask: Tensor, number: int, q_length: int, kv_length: int) -> tuple[Tensor, Tensor]:
    """(visible, written), each (B or 1, K or 1) bool, after checking every element."""
    is_as_made = _is_as_made(mask, number, q_length, kv_length)
    message = _changed(f"{q_length} queries and {kv_length} keys")
    if mask.is_cuda:
        torch._assert_async(is_as_made, message)
    elif not is_as_made:
        raise NotImplementedError(message)
    state = mask[:, 0, -1] & STATE_MASK
    return state == VISIBLE, state != UNWRITTEN


@_read_mask.register_fake
def _(mask: Tensor, number: int, q_length: int, kv_length: int) -> tuple[Tensor, Tensor]:
    state = mask[:, 0, -1]
    return torch.empty_like(state, dtype=torch.bool), torch.empty_like(state, dtype=torch.bool)

"""Wrong calls: each is refused before anything runs, in words that say which argument, what came, what is accepted."""

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fa_ops
from fa_ops_meta import checks, outputs
from tests.support.problems import op_arguments, small_case

OP = torch.ops.modelopt.varlen_attention
BACKWARD = torch.ops.modelopt.varlen_attention_backward


@dataclass(frozen=True)
class WrongCall:
    """A valid call of fa_ops.attention but for `changes`; a function there makes the argument from the valid one."""

    id: str
    error: type[Exception]
    message: str
    changes: dict[str, Any]
    is_padded: bool = False
    is_for_tracing: bool = True  # whether compiled and fake calls can be given such an argument

    def arguments(self) -> dict[str, Any]:
        arguments = valid_arguments(self.is_padded)
        changes = {name: new(arguments[name]) if callable(new) else new for name, new in self.changes.items()}
        return arguments | changes


def valid_arguments(is_padded: bool) -> dict[str, Any]:
    """Packed: q (12, 4, 16), k and v (12, 2, 16), B = 2. Padded: the rows are (2, 8)."""
    inputs = small_case(is_padded=is_padded).build()
    rows = (2, 8) if is_padded else (12,)
    tensors = {name: torch.randn(*rows, heads, 16) for name, heads in (("q", 4), ("k", 2), ("v", 2))}
    return tensors | {"b_start_loc": inputs.b_start_loc, "b_seq_len": inputs.b_seq_len}


def packed(id: str, error: type[Exception], message: str, **changes) -> WrongCall:
    return WrongCall(id, error, message, changes)


def padded(id: str, error: type[Exception], message: str, **changes) -> WrongCall:
    return WrongCall(id, error, message, changes, is_padded=True)


def untraceable(id: str, error: type[Exception], message: str, **changes) -> WrongCall:
    return WrongCall(id, error, message, changes, is_for_tracing=False)


def meta(t: torch.Tensor) -> torch.Tensor:
    return t.to("meta")


def exactly(message: str) -> str:
    return f"^{re.escape(message)}$"


INDEX = torch.zeros(2, dtype=torch.int32)
WRONG_CALLS = [
    # q, k, v
    packed(
        "q_rank", ValueError,
        "q: shape (4, 16) given; accepted are (total, Hq, D) packed and (B, S, Hq, D) padded", q=lambda q: q[0],
    ),
    packed(
        "q_dtype", TypeError, "q: dtype torch.float64 given; accepted are float16, bfloat16, float32",
        q=torch.Tensor.double,
    ),
    packed(
        "q_integer", TypeError, "q: dtype torch.int64 given; accepted are float16, bfloat16, float32",
        q=torch.Tensor.long,
    ),
    untraceable("q_type", TypeError, "q: list given; accepted is a Tensor", q=[1.0]),
    untraceable("k_none", TypeError, "k: NoneType given; accepted is a Tensor", k=None),
    untraceable(
        "q_layout", ValueError, "q: layout torch.sparse_coo given; accepted is torch.strided",
        q=torch.Tensor.to_sparse,
    ),
    packed(
        "q_stride", ValueError, "q: stride 16 in the last dimension given; it must be contiguous (stride 1)",
        q=torch.randn(12, 16, 16)[:, :, :4].transpose(1, 2),
    ),
    packed(
        "v_stride", ValueError, "v: stride 2 in the last dimension given; it must be contiguous (stride 1)",
        v=torch.randn(12, 2, 32)[..., ::2],
    ),
    packed("q_head_dim_small", ValueError, "q: head dimension 8 given; accepted are 16 to 256", q=lambda q: q[..., :8]),
    packed(
        "v_head_dim_large", ValueError, "v: head dimension 257 given; accepted are 16 to 256",
        v=torch.randn(12, 2, 257),
    ),
    packed(
        "k_rank", ValueError,
        "k: shape (1, 12, 2, 16) given; expected 3 dimensions, as q has: packed (total, H, D) and padded (B, S, H, D) "
        "tensors cannot be mixed", k=lambda k: k[None],
    ),
    packed("v_dtype", TypeError, "v: dtype torch.bfloat16 given; expected q's, torch.float32", v=torch.Tensor.bfloat16),
    packed("k_device", ValueError, "k: device meta given; expected q's, cpu", k=meta),
    packed("k_head_dim", ValueError, "k: head dimension 24 given; expected q's, 16", k=torch.randn(12, 2, 24)),
    packed(
        "v_rows", ValueError, "v: shape (11, 2, 16) given; expected k's, (12, 2, 16), but for the last dimension",
        v=lambda v: v[1:],
    ),
    packed(
        "heads_ratio", ValueError, "k: 3 heads given with 4 query heads; q's number of heads must be a multiple of k's",
        k=torch.randn(12, 3, 16), v=torch.randn(12, 3, 16),
    ),
    packed(
        "no_query_heads", ValueError,
        "k: 2 heads given with 0 query heads; q's number of heads must be a multiple of k's", q=lambda q: q[:, :0],
    ),
    padded("k_batch", ValueError, "k: batch size 1 given; expected q's, 2", k=lambda k: k[:1], v=lambda v: v[:1]),
    packed(
        "k_rows", ValueError,
        "k: 11 rows given with 12 query rows; where they differ, b_start_loc_k and b_seq_len_k are required",
        k=lambda k: k[1:], v=lambda v: v[1:],
    ),
    # starts and lengths
    packed(
        "b_start_loc_rank", ValueError, "b_start_loc: shape (2, 1) given; expected (B,), one entry for each sequence",
        b_start_loc=lambda t: t[:, None],
    ),
    packed(
        "b_seq_len_dtype", TypeError, "b_seq_len: dtype torch.float32 given; accepted are int32 and int64",
        b_seq_len=torch.Tensor.float,
    ),
    packed("b_seq_len_device", ValueError, "b_seq_len: device meta given; expected q's, cpu", b_seq_len=meta),
    packed(
        "b_seq_len_entries", ValueError, "b_seq_len: 1 entries given; expected as many as b_start_loc has, 2",
        b_seq_len=lambda t: t[1:],
    ),
    padded(
        "b_start_loc_entries", ValueError, "b_start_loc: 1 entries given; expected q's batch size, 2",
        b_start_loc=lambda t: t[1:], b_seq_len=lambda t: t[1:],
    ),
    untraceable("b_start_loc_type", TypeError, "b_start_loc: list given; accepted is a Tensor", b_start_loc=[0, 5]),
    packed(
        "b_seq_len_k_missing", ValueError,
        "b_seq_len_k: None given together with b_start_loc_k; the key side needs both b_start_loc_k and b_seq_len_k, "
        "or none of its arguments", b_start_loc_k=INDEX,
    ),
    packed(
        "b_start_loc_k_missing", ValueError,
        "b_start_loc_k: None given together with b_seq_len_k and max_input_len_k; the key side needs both "
        "b_start_loc_k and b_seq_len_k, or none of its arguments", b_seq_len_k=INDEX, max_input_len_k=7,
    ),
    packed(
        "key_side_missing", ValueError,
        "b_start_loc_k: None given together with max_input_len_k; the key side needs both b_start_loc_k and "
        "b_seq_len_k, or none of its arguments", max_input_len_k=7,
    ),
    packed(
        "b_start_loc_k_dtype", TypeError, "b_start_loc_k: dtype torch.int16 given; accepted are int32 and int64",
        b_start_loc_k=INDEX.short(), b_seq_len_k=INDEX,
    ),
    packed(
        "b_start_loc_k_entries", ValueError, "b_start_loc_k: 1 entries given; expected as many as b_start_loc has, 2",
        b_start_loc_k=INDEX[1:], b_seq_len_k=INDEX[1:],
    ),
    untraceable(
        "b_seq_len_k_type", TypeError, "b_seq_len_k: tuple given; accepted is a Tensor or None",
        b_start_loc_k=INDEX, b_seq_len_k=(5, 7),
    ),
    # numbers and flags
    packed(
        "max_input_len_negative", ValueError, "max_input_len: -1 given; it must be 0 or more, or None",
        max_input_len=-1,
    ),
    packed(
        "max_input_len_k_negative", ValueError, "max_input_len_k: -2 given; it must be 0 or more, or None",
        b_start_loc_k=INDEX, b_seq_len_k=INDEX, max_input_len_k=-2,
    ),
    untraceable(
        "max_input_len_tensor", TypeError, "max_input_len: Tensor given; accepted are int and None",
        max_input_len=torch.tensor(7),
    ),
    untraceable(
        "max_input_len_bool", TypeError, "max_input_len: bool given; accepted are int and None", max_input_len=True
    ),
    untraceable(
        "max_input_len_float", TypeError, "max_input_len: float given; accepted are int and None", max_input_len=7.0
    ),
    packed(
        "softmax_scale_nan", ValueError, "softmax_scale: nan given; it must be finite, or None for 1/sqrt(D)",
        softmax_scale=float("nan"),
    ),
    packed(
        "softmax_scale_infinite", ValueError, "softmax_scale: -inf given; it must be finite, or None for 1/sqrt(D)",
        softmax_scale=float("-inf"),
    ),
    untraceable(
        "softmax_scale_tensor", TypeError, "softmax_scale: Tensor given; accepted are float and None",
        softmax_scale=torch.tensor(0.1),
    ),
    untraceable("is_causal_none", TypeError, "is_causal: NoneType given; accepted are True and False", is_causal=None),
    untraceable("is_causal_int", TypeError, "is_causal: int given; accepted are True and False", is_causal=1),
    untraceable(
        "deterministic_int", TypeError, "deterministic: int given; accepted are True, False and None", deterministic=1
    ),
    # key_mask
    packed(
        "key_mask_packed", ValueError, "key_mask: given with packed k; it is for the padded layout, (B, S, Hkv, D)",
        key_mask=torch.ones(2, 8, dtype=torch.bool),
    ),
    padded(
        "key_mask_dtype", TypeError,
        "key_mask: dtype torch.float32 given; accepted is bool (True for keys to attend to)", key_mask=torch.ones(2, 8),
    ),
    padded(
        "key_mask_shape", ValueError, "key_mask: shape (2, 1, 1, 8) given; expected (B, Sk) = (2, 8)",
        key_mask=torch.ones(2, 1, 1, 8, dtype=torch.bool),
    ),
    padded(
        "key_mask_device", ValueError, "key_mask: device meta given; expected k's, cpu",
        key_mask=torch.ones(2, 8, dtype=torch.bool, device="meta"),
    ),
    # window, softcap, sinks
    packed(
        "window_negative", ValueError,
        "window_left (window_size[0]): -2 given; accepted are -1 (unlimited) and sizes of 0 or more",
        window_size=(-2, -1),
    ),
    untraceable(
        "window_triple", TypeError, "window_size: (-1, -1, 7) given; accepted is a pair of ints",
        window_size=(-1, -1, 7),
    ),
    untraceable("window_int", TypeError, "window_size: 3 given; accepted is a pair of ints", window_size=3),
    untraceable(
        "window_bool", TypeError, "window_size: (True, -1) given; accepted is a pair of ints", window_size=(True, -1)
    ),
    packed(
        "softcap_negative", ValueError, "softcap: -30.0 given; it must be finite and positive, or 0.0 for none",
        softcap=-30.0,
    ),
    packed(
        "softcap_nan", ValueError, "softcap: nan given; it must be finite and positive, or 0.0 for none",
        softcap=float("nan"),
    ),
    packed("sinks_shape", ValueError, "sinks: shape (2,) given; expected (Hq,) = (4,)", sinks=torch.zeros(2)),
    packed(
        "sinks_dtype", TypeError, "sinks: dtype torch.int64 given; accepted are float16, bfloat16, float32",
        sinks=torch.zeros(4, dtype=torch.int64),
    ),
    packed(
        "sinks_device", ValueError, "sinks: device meta given; expected q's, cpu", sinks=torch.zeros(4, device="meta")
    ),
    untraceable("sinks_type", TypeError, "sinks: float given; accepted is a Tensor or None", sinks=0.5),
    # skip-softmax
    packed(
        "skip_softmax_threshold_shape", ValueError,
        "skip_softmax_threshold: shape (7,) given; accepted are (), (B,) = (2,) and (B, Hq) = (2, 4)",
        skip_softmax_threshold=torch.full((7,), 0.1),
    ),
    packed(
        "skip_softmax_threshold_dtype", TypeError,
        "skip_softmax_threshold: dtype torch.float64 given; accepted is float32",
        skip_softmax_threshold=torch.tensor(0.1, dtype=torch.float64),
    ),
    packed(
        "skip_softmax_threshold_device", ValueError,
        "skip_softmax_threshold: device meta given; expected q's, cpu",
        skip_softmax_threshold=torch.zeros(4, device="meta")[0],
    ),
    packed(
        "skip_softmax_threshold_negative", ValueError,
        "skip_softmax_threshold: -0.1 given; accepted are floats in (0, 1), and None or 0.0 for dense attention",
        skip_softmax_threshold=-0.1,
    ),
    packed(
        "skip_softmax_threshold_nan", ValueError,
        "skip_softmax_threshold: nan given; accepted are floats in (0, 1), and None or 0.0 for dense attention",
        skip_softmax_threshold=float("nan"),
    ),
    untraceable(
        "skip_softmax_threshold_type", TypeError,
        "skip_softmax_threshold: str given; accepted are a Tensor, a float and None", skip_softmax_threshold="0.1",
    ),
    packed(
        "skip_softmax_block", ValueError,
        "skip_softmax_block_q (skip_softmax_block[0]): 48 given; accepted are (16, 32, 64, 128)",
        skip_softmax_block=(48, 128),
    ),
    packed(
        "return_skip_counts", ValueError,
        "return_skip_counts: True given with skip_softmax_threshold None; dense attention counts nothing, pass a "
        "threshold in (0, 1) or False",
        return_skip_counts=True,
    ),
    packed(
        "return_skip_counts_off", ValueError,
        "return_skip_counts: True given with skip_softmax_threshold 0.0; dense attention counts nothing, pass a "
        "threshold in (0, 1) or False",
        return_skip_counts=True, skip_softmax_threshold=0.0,
    ),
]  # fmt: skip
each_wrong_call = pytest.mark.parametrize("wrong", WRONG_CALLS, ids=lambda wrong: wrong.id)
each_traceable_wrong_call = pytest.mark.parametrize(
    "wrong", [wrong for wrong in WRONG_CALLS if wrong.is_for_tracing], ids=lambda wrong: wrong.id
)


class _AllocatedError(Exception):
    """Outputs were allocated, which is the first thing that a call does once its arguments are checked."""


@pytest.fixture
def nothing_runs(monkeypatch):
    def refuse(*args):
        raise _AllocatedError

    for allocate in ("empty_forward", "empty_backward", "empty_skip", "empty_dsinks"):
        monkeypatch.setattr(outputs, allocate, refuse)


@each_wrong_call
@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "grad"])
def test_refused_in_these_words(wrong, requires_grad, nothing_runs):
    arguments = wrong.arguments()
    for name in "qkv":
        t = arguments[name]
        if requires_grad and isinstance(t, torch.Tensor) and t.is_floating_point():
            t.requires_grad_()
    with pytest.raises(wrong.error, match=exactly(wrong.message)) as caught:
        fa_ops.attention(**arguments)
    assert caught.type is wrong.error


@pytest.mark.parametrize("is_padded", [False, True], ids=["packed", "padded"])
def test_the_valid_call_would_run(is_padded, nothing_runs):
    with pytest.raises(_AllocatedError):
        fa_ops.attention(**valid_arguments(is_padded))


@each_traceable_wrong_call
def test_refused_in_these_words_for_fake_tensors(wrong):
    mode = FakeTensorMode()
    fake = {
        name: mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
        for name, value in wrong.arguments().items()
    }
    with mode, pytest.raises(wrong.error, match=exactly(wrong.message)):
        fa_ops.attention(**fake)


@each_traceable_wrong_call
def test_the_words_survive_compilation(wrong, fresh_compiler):
    with pytest.raises(Exception, match=re.escape(wrong.message)):
        torch.compile(fa_ops.attention, fullgraph=True, backend="eager")(**wrong.arguments())


def test_every_argument_is_refused_somewhere():
    refused = {wrong.message.partition(":")[0].partition(" ")[0] for wrong in WRONG_CALLS}
    parameters = {
        "q", "k", "v", "b_start_loc", "b_seq_len", "max_input_len", "is_causal", "softmax_scale", "b_start_loc_k",
        "b_seq_len_k", "max_input_len_k", "window_size", "softcap", "sinks", "key_mask", "deterministic",
        "skip_softmax_threshold", "return_skip_counts",
    }  # fmt: skip
    assert parameters <= refused


def small_op_arguments() -> dict[str, Any]:
    names = [argument.name for argument in OP.default._schema.arguments]
    return dict(zip(names, op_arguments(small_case().build()), strict=True))


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (
            ValueError,
            "window_right (window_size[1]): -3 given; accepted are -1 (unlimited) and sizes of 0 or more",
            {"window_right": -3},
        ),
        (
            ValueError, "skip_softmax_block_k (skip_softmax_block[1]): 0 given; accepted are (16, 32, 64, 128)",
            {"skip_softmax_block_k": 0},
        ),
        (TypeError, "k: dtype torch.float16 given; expected q's, torch.float32", {"k": torch.zeros(12, 2, 16).half()}),
        (
            ValueError,
            "k: 5 rows given with 12 query rows; where they differ, b_start_loc_k and b_seq_len_k are required",
            {"k": torch.zeros(5, 2, 16), "v": torch.zeros(5, 2, 16)},
        ),
    ],
    ids=["window_right", "skip_softmax_block_k", "k_dtype", "k_rows"],
)  # fmt: skip
def test_the_op_itself_refuses(error, message, changes, nothing_runs):
    with pytest.raises(error, match=exactly(message)):
        OP(**small_op_arguments() | changes)


@pytest.mark.parametrize(
    ("name", "wrong", "error", "message"),
    [
        ("dout", torch.zeros(11, 4, 16), ValueError, "dout: shape (11, 4, 16) given; expected (12, 4, 16)"),
        ("dout", torch.zeros(12, 4, 16).double(), TypeError, "dout: dtype torch.float64 given; expected torch.float32"),
        ("dout", torch.zeros(12, 4, 16, device="meta"), ValueError, "dout: device meta given; expected q's, cpu"),
        ("dlse", torch.zeros(12, 4), ValueError, "dlse: shape (12, 4) given; expected (4, 12)"),
    ],
    ids=["dout_shape", "dout_dtype", "dout_device", "dlse_shape"],
)
def test_the_backward_op_refuses(name, wrong, error, message):
    arguments = small_op_arguments()
    out, lse, block_bits, _ = OP(**arguments)
    given = {"dout": torch.zeros_like(out), "dlse": None, "out": out, "lse": lse, "block_bits": block_bits} | arguments
    with pytest.raises(error, match=exactly(message)):
        BACKWARD(**given | {name: wrong})


def test_old_gpus_are_refused_by_name():
    message = "q: device 'Tesla T4' has compute capability 7.5; the kernels need 8.0 (sm_80) or higher"
    with pytest.raises(ValueError, match=exactly(message)):
        checks.check_capability(7, 5, "Tesla T4")
    checks.check_capability(8, 0, "A100")


def test_other_devices_are_refused_by_name():
    message = "q: device xpu:0 given; accepted are cpu and cuda (sm_80 or higher)"
    with FakeTensorMode():
        q = torch.empty(12, 4, 16, device="xpu")
        index = torch.empty(2, dtype=torch.int32, device="xpu")
        with pytest.raises(ValueError, match=exactly(message)):
            fa_ops.attention(q, q, q, index, index)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64], ids=str)
def test_autocast_leaves_what_it_cannot_cast(dtype):
    """As SDPA's autocast: neither float64 nor integers become bfloat16 on the quiet."""
    arguments = valid_arguments(False)
    q, k, v = (arguments[name].to(dtype) for name in "qkv")
    message = f"q: dtype {dtype} given; accepted are float16, bfloat16, float32"
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=exactly(message)):
        fa_ops.attention(**arguments | {"q": q, "k": k, "v": v})

"""Validation of the op's arguments from shapes, dtypes, strides and devices: every error message lives here.

Nothing is read back from a device. Shapes are B sequences, Hq query heads, Hkv key and value heads, head dimension D,
value head dimension Dv; packed tensors are (total, H, D), padded ones (B, S, H, D).
"""

import math
from typing import Any

import torch
from torch import Tensor

from fa_ops_meta.skip import BLOCK_SIZES

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INDEX_DTYPES = (torch.int32, torch.int64)
DEVICES = ("cpu", "cuda", "meta")
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
MIN_CAPABILITY = (8, 0)
OVERLAP = (
    "b_start_loc_k, b_seq_len_k: ranges given that overlap, where a gradient of k or v is asked for; accepted are "
    "ranges without a key in common; repeat the shared keys, or detach k and v"
)


def check_types(
    tensors: dict[str, Any],
    optional_tensors: dict[str, Any],
    integers: dict[str, Any],
    pairs: dict[str, Any],
    is_causal: Any,
    softmax_scale: Any,
    deterministic: Any,
) -> None:
    """What the op's schema would convert or refuse without a word of the argument. A tensor is no number here: reading
    it would wait for the device."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: {type(value).__name__} given; accepted is a Tensor")
    for name, value in optional_tensors.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name}: {type(value).__name__} given; accepted is a Tensor or None")
    for name, value in integers.items():
        if value is not None and not _is_int(value):
            raise TypeError(f"{name}: {type(value).__name__} given; accepted are int and None")
    for name, value in pairs.items():
        if not (isinstance(value, (tuple, list)) and len(value) == 2 and _is_int(value[0]) and _is_int(value[1])):
            raise TypeError(f"{name}: {value!r} given; accepted is a pair of ints")
    if not isinstance(is_causal, bool):
        raise TypeError(f"is_causal: {type(is_causal).__name__} given; accepted are True and False")
    if softmax_scale is not None and not isinstance(softmax_scale, (float, int, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"softmax_scale: {type(softmax_scale).__name__} given; accepted are float and None")
    if deterministic is not None and not isinstance(deterministic, bool):
        raise TypeError(f"deterministic: {type(deterministic).__name__} given; accepted are True, False and None")


def _is_int(value: Any) -> bool:
    return type(value) is int or (isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool))


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    b_start_loc: Tensor,
    b_seq_len: Tensor,
    max_input_len: int | None = None,
    is_causal: bool = True,
    softmax_scale: float | None = None,
    b_start_loc_k: Tensor | None = None,
    b_seq_len_k: Tensor | None = None,
    max_input_len_k: int | None = None,
    window_left: int = -1,
    window_right: int = -1,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    key_mask: Tensor | None = None,
    block_table: Tensor | None = None,
    deterministic: bool = True,
    skip_softmax_threshold: Tensor | None = None,
    skip_softmax_block_q: int = 64,
    skip_softmax_block_k: int = 128,
) -> None:
    """Takes the op's arguments. Raises TypeError for a dtype, ValueError for the rest."""
    for name, size in (
        ("window_left (window_size[0])", window_left),
        ("window_right (window_size[1])", window_right),
    ):
        if size < -1:
            raise ValueError(f"{name}: {size} given; accepted are -1 (unlimited) and sizes of 0 or more")
    if not (math.isfinite(softcap) and softcap >= 0.0):
        raise ValueError(f"softcap: {softcap} given; it must be finite and positive, or 0.0 for none")
    for name, size in (
        ("skip_softmax_block_q (skip_softmax_block[0])", skip_softmax_block_q),
        ("skip_softmax_block_k (skip_softmax_block[1])", skip_softmax_block_k),
    ):
        if size not in BLOCK_SIZES:
            raise ValueError(f"{name}: {size} given; accepted are {BLOCK_SIZES}")
    _check_qkv(q, k, v, block_table is not None)
    _check_scalars(softmax_scale, max_input_len, max_input_len_k)
    _check_ranges("", q, b_start_loc, b_seq_len)
    if block_table is not None:
        _check_paging(q, b_seq_len, b_start_loc_k, b_seq_len_k, key_mask, block_table)
    else:
        _check_key_side(q, k, b_start_loc, b_start_loc_k, b_seq_len_k, max_input_len_k)
    if key_mask is not None:
        _check_key_mask(k, key_mask)
    if sinks is not None:
        _check_sinks(q, sinks)
    if skip_softmax_threshold is not None:
        _check_threshold(q, b_seq_len, skip_softmax_threshold)


def check_capability(major: int, minor: int, name: str) -> None:
    """A CUDA device must have compute capability 8.0 or higher."""
    if (major, minor) < MIN_CAPABILITY:
        raise ValueError(
            f"q: device {name!r} has compute capability {major}.{minor}; the kernels need 8.0 (sm_80) or higher"
        )


def check_no_backward(block_table: Tensor | None) -> None:
    """Where a gradient is asked for."""
    if block_table is not None:
        raise NotImplementedError(
            "block_table: a Tensor given where a gradient is asked for; a paged cache has no backward, detach q, k, v "
            "and sinks or call under torch.no_grad()"
        )


def check_gradients(out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None) -> None:
    """What the backward op checks beyond the forward's arguments: `dout` is like `out`, `dlse` like `lse`."""
    for name, grad, like in (("dout", dout, out), ("dlse", dlse, lse)):
        if grad is None:
            continue
        if grad.shape != like.shape:
            raise ValueError(f"{name}: shape {_shape(grad)} given; expected {_shape(like)}")
        if grad.dtype != like.dtype:
            raise TypeError(f"{name}: dtype {grad.dtype} given; expected {like.dtype}")
        if grad.device != like.device:
            raise ValueError(f"{name}: device {grad.device} given; expected q's, {like.device}")


def check_out(out: Tensor, query: Tensor, value: Tensor) -> None:
    """What `varlen_attn_out` checks of the tensor that the result is copied into."""
    expected = (*query.shape[:-1], value.shape[-1])
    if out.shape != expected:
        raise ValueError(f"out: shape {_shape(out)} given; expected (total_q, Hq, Dv) = {expected}")
    if out.dtype != query.dtype:
        raise TypeError(f"out: dtype {out.dtype} given; expected query's, {query.dtype}")
    if out.device != query.device:
        raise ValueError(f"out: device {out.device} given; expected query's, {query.device}")


def _shape(t: Tensor) -> str:
    return str(tuple(t.shape))


def _check_qkv(q: Tensor, k: Tensor, v: Tensor, is_paged: bool) -> None:
    rank = q.dim()
    if rank not in (3, 4):
        raise ValueError(f"q: shape {_shape(q)} given; accepted are (total, Hq, D) packed and (B, S, Hq, D) padded")
    if q.dtype not in DTYPES:
        raise TypeError(f"q: dtype {q.dtype} given; accepted are float16, bfloat16, float32")
    if q.device.type not in DEVICES:
        raise ValueError(f"q: device {q.device} given; accepted are cpu and cuda (sm_80 or higher)")
    if q.is_cuda and torch.version.hip is not None:
        raise ValueError(f"q: device {q.device} is a ROCm device; accepted are cpu and NVIDIA cuda (sm_80 or higher)")
    for name, t in (("q", q), ("k", k), ("v", v)):
        if t.layout is not torch.strided:
            raise ValueError(f"{name}: layout {t.layout} given; accepted is torch.strided")
    for name, t in (("k", k), ("v", v)):
        if is_paged and t.dim() != 4:
            raise ValueError(f"{name}: shape {_shape(t)} given with block_table; expected (pages, page size, Hkv, D)")
        if not is_paged and t.dim() != rank:
            raise ValueError(
                f"{name}: shape {_shape(t)} given; expected {rank} dimensions, as q has: packed (total, H, D) and "
                "padded (B, S, H, D) tensors cannot be mixed"
            )
        if t.dtype != q.dtype:
            raise TypeError(f"{name}: dtype {t.dtype} given; expected q's, {q.dtype}")
        if t.device != q.device:
            raise ValueError(f"{name}: device {t.device} given; expected q's, {q.device}")
    for name, t in (("q", q), ("k", k), ("v", v)):
        head_dim = t.shape[-1]
        if not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
            raise ValueError(f"{name}: head dimension {head_dim} given; accepted are {MIN_HEAD_DIM} to {MAX_HEAD_DIM}")
        if t.stride(-1) != 1:
            raise ValueError(
                f"{name}: stride {t.stride(-1)} in the last dimension given; it must be contiguous (stride 1)"
            )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(f"k: head dimension {k.shape[-1]} given; expected q's, {q.shape[-1]}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v: shape {_shape(v)} given; expected k's, {_shape(k)}, but for the last dimension")
    heads_q, heads_kv = q.shape[-2], k.shape[-2]
    if heads_kv == 0 or heads_q == 0 or heads_q % heads_kv != 0:
        raise ValueError(
            f"k: {heads_kv} heads given with {heads_q} query heads; q's number of heads must be a multiple of k's"
        )
    if is_paged and k.shape[1] == 0:
        raise ValueError("k: page size 0 given; with block_table it must be 1 or more")
    if rank == 4 and not is_paged and k.shape[0] != q.shape[0]:
        raise ValueError(f"k: batch size {k.shape[0]} given; expected q's, {q.shape[0]}")


def _check_scalars(softmax_scale: float | None, max_input_len: int | None, max_input_len_k: int | None) -> None:
    if softmax_scale is not None and not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale: {softmax_scale} given; it must be finite, or None for 1/sqrt(D)")
    for name, size in (("max_input_len", max_input_len), ("max_input_len_k", max_input_len_k)):
        if size is not None and size < 0:
            raise ValueError(f"{name}: {size} given; it must be 0 or more, or None")


def _check_ranges(suffix: str, q: Tensor, start: Tensor, length: Tensor) -> None:
    for name, t in ((f"b_start_loc{suffix}", start), (f"b_seq_len{suffix}", length)):
        _check_index(name, q, t)
    if length.shape[0] != start.shape[0]:
        raise ValueError(
            f"b_seq_len{suffix}: {length.shape[0]} entries given; expected as many as b_start_loc{suffix} has, "
            f"{start.shape[0]}"
        )
    if q.dim() == 4 and start.shape[0] != q.shape[0]:
        raise ValueError(f"b_start_loc{suffix}: {start.shape[0]} entries given; expected q's batch size, {q.shape[0]}")


def _check_index(
    name: str, q: Tensor, t: Tensor, rank: int = 1, expected: str = "(B,), one entry for each sequence"
) -> None:
    if t.dim() != rank:
        raise ValueError(f"{name}: shape {_shape(t)} given; expected {expected}")
    if t.dtype not in INDEX_DTYPES:
        raise TypeError(f"{name}: dtype {t.dtype} given; accepted are int32 and int64")
    if t.device != q.device:
        raise ValueError(f"{name}: device {t.device} given; expected q's, {q.device}")


def _check_key_side(
    q: Tensor,
    k: Tensor,
    b_start_loc: Tensor,
    b_start_loc_k: Tensor | None,
    b_seq_len_k: Tensor | None,
    max_input_len_k: int | None,
) -> None:
    given = [
        name
        for name, value in (
            ("b_start_loc_k", b_start_loc_k),
            ("b_seq_len_k", b_seq_len_k),
            ("max_input_len_k", max_input_len_k),
        )
        if value is not None
    ]
    for name, value in (("b_start_loc_k", b_start_loc_k), ("b_seq_len_k", b_seq_len_k)):
        if given and value is None:
            raise ValueError(
                f"{name}: None given together with {' and '.join(given)}; the key side needs both b_start_loc_k and "
                "b_seq_len_k, or none of its arguments"
            )
    if b_start_loc_k is not None and b_seq_len_k is not None:
        _check_ranges("_k", q, b_start_loc_k, b_seq_len_k)
        if b_start_loc_k.shape[0] != b_start_loc.shape[0]:
            raise ValueError(
                f"b_start_loc_k: {b_start_loc_k.shape[0]} entries given; expected as many as b_start_loc has, "
                f"{b_start_loc.shape[0]}"
            )
    elif k.shape[-3] != q.shape[-3]:
        raise ValueError(
            f"k: {k.shape[-3]} rows given with {q.shape[-3]} query rows; where they differ, b_start_loc_k and "
            "b_seq_len_k are required"
        )


def _check_paging(
    q: Tensor,
    b_seq_len: Tensor,
    b_start_loc_k: Tensor | None,
    b_seq_len_k: Tensor | None,
    key_mask: Tensor | None,
    block_table: Tensor,
) -> None:
    if b_start_loc_k is not None:
        raise ValueError(
            "b_start_loc_k: a Tensor given with block_table; a sequence's keys begin with the first row of its first "
            "page, pass None"
        )
    if b_seq_len_k is None:
        raise ValueError(
            "b_seq_len_k: None given with block_table; a paged cache needs the number of keys of each sequence, (B,)"
        )
    if key_mask is not None:
        raise ValueError("key_mask: given with block_table; it is for the padded layout, (B, S, Hkv, D), pass None")
    _check_index("b_seq_len_k", q, b_seq_len_k)
    _check_index("block_table", q, block_table, 2, "(B, max_pages), the pages of each sequence")
    for name, t in (("b_seq_len_k", b_seq_len_k), ("block_table", block_table)):
        if t.shape[0] != b_seq_len.shape[0]:
            raise ValueError(
                f"{name}: {t.shape[0]} sequences given; expected as many as b_seq_len has, {b_seq_len.shape[0]}"
            )


def _check_key_mask(k: Tensor, key_mask: Tensor) -> None:
    if k.dim() != 4:
        raise ValueError("key_mask: given with packed k; it is for the padded layout, (B, S, Hkv, D)")
    if key_mask.dtype != torch.bool:
        raise TypeError(f"key_mask: dtype {key_mask.dtype} given; accepted is bool (True for keys to attend to)")
    if key_mask.shape != k.shape[:2]:
        raise ValueError(f"key_mask: shape {_shape(key_mask)} given; expected (B, Sk) = {_shape(k[..., 0, 0])}")
    if key_mask.device != k.device:
        raise ValueError(f"key_mask: device {key_mask.device} given; expected k's, {k.device}")


def _check_sinks(q: Tensor, sinks: Tensor) -> None:
    if sinks.shape != q.shape[-2:-1]:
        raise ValueError(f"sinks: shape {_shape(sinks)} given; expected (Hq,) = ({q.shape[-2]},)")
    if sinks.dtype not in DTYPES:
        raise TypeError(f"sinks: dtype {sinks.dtype} given; accepted are float16, bfloat16, float32")
    if sinks.device != q.device:
        raise ValueError(f"sinks: device {sinks.device} given; expected q's, {q.device}")


def _check_threshold(q: Tensor, b_seq_len: Tensor, threshold: Tensor) -> None:
    num_seqs, heads = b_seq_len.shape[0], q.shape[-2]
    if threshold.shape not in ((), (num_seqs,), (num_seqs, heads)):
        raise ValueError(
            f"skip_softmax_threshold: shape {_shape(threshold)} given; accepted are (), (B,) = ({num_seqs},) and "
            f"(B, Hq) = ({num_seqs}, {heads})"
        )
    if threshold.dtype != torch.float32:
        raise TypeError(f"skip_softmax_threshold: dtype {threshold.dtype} given; accepted is float32")
    if threshold.device != q.device:
        raise ValueError(f"skip_softmax_threshold: device {threshold.device} given; expected q's, {q.device}")

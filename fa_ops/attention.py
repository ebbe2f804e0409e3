"""The public functions: their semantics, their arguments, what they add to the op."""

import warnings
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fa_ops import ops, varlen
from fa_ops_meta import checks

if TYPE_CHECKING:
    from torch.nn.attention.varlen import AuxRequest


def attention(
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
    *,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    key_mask: Tensor | None = None,
    deterministic: bool | None = None,
    skip_softmax_threshold: Tensor | float | None = None,
    skip_softmax_block: tuple[int, int] = (64, 128),
    return_lse: bool = False,
    return_skip_counts: bool = False,
    block_table: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Attention over a batch of sequences of different lengths: softmax(softmax_scale * Q K^T) V for each.

    Shapes: B sequences, Hq query heads, Hkv key and value heads (Hq a multiple of Hkv: grouped-query attention), head
    dimension D, value head dimension Dv, both 16 to 256. *Packed*: the sequences lie in one (total, H, D) tensor.
    *Padded*: a (B, S, H, D) tensor with one sequence in each row, padding left or right of it. Either way sequence b
    occupies the rows ``b_start_loc[b] <= row < b_start_loc[b] + b_seq_len[b]`` (of its own batch row, if padded).

    Causal attention is bottom-right aligned: with len_q rows and len_k keys in a sequence, row i sees the keys
    ``j <= i + len_k - len_q``.

    Args:
        q: (total_q, Hq, D) or (B, Sq, Hq, D), float16, bfloat16 or float32. Any strides, but for a contiguous last
            dimension; nothing is copied.
        k: (total_k, Hkv, D) or (B, Sk, Hkv, D), of q's kind, dtype and device. The transpose of a (B, Hkv, S, D) cache
            will do.
        v: (total_k, Hkv, Dv) or (B, Sk, Hkv, Dv), likewise.
        b_start_loc: (B,) int32 or int64, first row of each sequence. The query ranges do not overlap.
        b_seq_len: (B,) int32 or int64, rows of each sequence; 0 is allowed. Ranges are clamped into the tensors.
        max_input_len: accepted for compatibility. It never changes a result, and None costs no synchronisation.
        is_causal: causal (bottom-right aligned) or full attention.
        softmax_scale: 1 / sqrt(D) if None.
        b_start_loc_k: (B,) int32 or int64, first key of each sequence; with ``b_seq_len_k``, or neither: then the key
            ranges are the query ranges. Key ranges may overlap where no gradient of k or v is asked for. Where one is,
            the backward raises ValueError on CPU tensors, and stops a GPU with an assertion, without a synchronisation.
        b_seq_len_k: (B,) int32 or int64, keys of each sequence.
        max_input_len_k: as ``max_input_len``.
        window_size: (left, right), keys that a row sees before and after its own position, -1 for unlimited: key j is
            visible to row i when ``-left <= j - (i + len_k - len_q) <= right``. Causal attention has right = 0.
        softcap: scores become ``softcap * tanh(scores / softcap)``; 0.0 for none.
        sinks: (Hq,) floating point, an additional logit in the softmax's denominator of each head, without a value;
            differentiable. lse includes it, and is the sink for rows that see no key.
        key_mask: (B, Sk) bool, padded layout only: False for keys to leave out inside a sequence's range (holes).
        deterministic: there is one form, and it is deterministic: the same inputs give the same bits, forward and
            backward, and a sequence's result does not depend on its neighbours.
        skip_softmax_threshold: λ of skip-softmax (BLASST, arXiv 2512.12087): a block of keys whose scores all lie more
            than -ln λ below the largest visited before, in every row of a block of queries that sees a key of it, is
            dropped, as if masked. A float in (0, 1), or a float32 tensor (), (B,) or (B, Hq) on q's device, of which
            values outside (0, 1) drop nothing. None or 0.0: dense attention, bit for bit. Gradients are those of the
            blocks that were kept.
        skip_softmax_block: (query rows, keys) of a block, each 16, 32, 64 or 128, counted from a sequence's first
            query and key. Part of the meaning, like the order in which blocks are visited: the first, then from the
            last to the second. For one query the maximum starts anew, from the first block, in every 2048 keys.
        return_lse: also return lse.
        return_skip_counts: also return the numbers of blocks, (2, B, Hq) int64: visited, and dropped of these.
        block_table: (B, max_pages) int32 or int64, the pages of each sequence in their order, which makes k and v a
            paged cache, (pages, page size, Hkv, D) and (pages, page size, Hkv, Dv), of any page size and strides: key n
            of sequence b is row ``n % page_size`` of page ``block_table[b, n // page_size]``. ``b_seq_len_k`` is
            required then, ``b_start_loc_k`` and ``key_mask`` are refused, and there are no gradients. Sequences may
            share pages. Entries behind the last key are not read, page numbers are clamped to those of pages, lengths
            to ``max_pages * page_size``.

    Returns:
        out, like q with head dimension Dv, contiguous; rows that belong to no sequence or see no key are 0. Or a tuple
        of out and what is asked for, lse before counts: lse is the natural logarithm of the softmax's denominator,
        float32, (Hq, total_q) or (B, Hq, Sq), -inf for rows that belong to no sequence or see no key. Both are
        differentiable in q, k and v.

    Queries of one row, (B, 1, Hq, D), are decoding: on a GPU their keys are split among programs (`fa_ops.decoding`).

    Under autocast q, k and v are cast to its dtype. On CPU tensors the op loops over PyTorch's flash attention; on CUDA
    tensors (compute capability 8.0 or higher) it runs Triton kernels (FlashAttention-2, arXiv 2307.08691).

    Raises:
        ValueError: a shape, stride, device or value that is not accepted.
        TypeError: a dtype that is not accepted.
        NotImplementedError: forward-mode differentiation, and a gradient through a paged cache.
    """
    checks.check_types(
        {"q": q, "k": k, "v": v, "b_start_loc": b_start_loc, "b_seq_len": b_seq_len},
        {
            "b_start_loc_k": b_start_loc_k, "b_seq_len_k": b_seq_len_k, "sinks": sinks, "key_mask": key_mask,
            "block_table": block_table,
        },
        {"max_input_len": max_input_len, "max_input_len_k": max_input_len_k},
        {"window_size": window_size, "skip_softmax_block": skip_softmax_block},
        is_causal, softmax_scale, deterministic,
    )  # fmt: skip
    threshold = _threshold_tensor(skip_softmax_threshold, q)
    if return_skip_counts and threshold is None:
        raise ValueError(
            f"return_skip_counts: True given with skip_softmax_threshold {skip_softmax_threshold}; dense attention "
            "counts nothing, pass a threshold in (0, 1) or False"
        )
    may_need_grad = block_table is not None and torch.is_grad_enabled()
    if may_need_grad and any(t is not None and t.requires_grad for t in (q, k, v, sinks)):
        checks.check_no_backward(block_table)
    if not torch.compiler.is_compiling():
        _refuse_forward_mode(q, k, v)
    q, k, v = _autocast(q, k, v)
    out, lse, _, counts = ops.attend(
        q, k, v, b_start_loc, b_seq_len, max_input_len, is_causal, softmax_scale,
        b_start_loc_k, b_seq_len_k, max_input_len_k, window_size[0], window_size[1], softcap, sinks, key_mask,
        block_table, deterministic is not False, threshold, skip_softmax_block[0], skip_softmax_block[1],
    )  # fmt: skip
    if not (return_lse or return_skip_counts):
        return out
    return (out, *[lse] * return_lse, *[counts] * return_skip_counts)


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: "AuxRequest | None" = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """`attention` of packed sequences, called as `torch.nn.attention.varlen.varlen_attn` of torch 2.13 is.

    Unlike torch's it runs on CPU tensors too, is differentiable in lse, and takes any strides.

    Args:
        query: (total_q, Hq, D), see `attention`.
        key: (total_k, Hkv, D), or a paged cache, (pages, page size, Hkv, D): any page size, any strides, no copy.
        value: (total_k, Hkv, Dv), or (pages, page size, Hkv, Dv).
        cu_seq_q: (B + 1,) int32 or int64: 0, the end of the first sequence, ..., the end of the last.
        cu_seq_k: (B + 1,), likewise of the keys. A paged cache takes None, or a Tensor, whose values have no influence:
            the pages tell where keys lie, and ``seqused_k`` how many there are.
        max_q: longest sequence of queries; never changes a result.
        max_k: longest sequence of keys, likewise.
        return_aux: with ``lse=True`` also return lse, (Hq, total_q) float32.
        scale: 1 / sqrt(D) if None.
        window_size: (left, right), -1 for unlimited; (-1, 0) is causal attention, bottom-right aligned.
        enable_gqa: accept fewer heads of keys and values than of queries.
        seqused_k: (B,) int32 or int64, keys of each sequence, counted from its begin in ``cu_seq_k``; all if None. A
            paged cache needs it.
        block_table: (B, max_pages) int32 or int64, the pages of each sequence, which makes key and value a paged cache,
            see `attention`.
        num_splits: a sequence's result never depends on its neighbours, whatever is given here.

    Returns:
        out (total_q, Hq, Dv), or (out, lse).

    Raises:
        As `attention`; ValueError for unequal numbers of heads without ``enable_gqa``, and for a block_table without
        ``seqused_k``; NotImplementedError for a block_table where a gradient is asked for.
    """
    if not enable_gqa and query.shape[-2] != key.shape[-2]:
        raise ValueError(
            f"enable_gqa: False given, with {query.shape[-2]} heads of query and {key.shape[-2]} of key; expected "
            "equal numbers, or True"
        )
    _check_cache(cu_seq_q, cu_seq_k, seqused_k, block_table)
    b_start_loc, b_seq_len = varlen.from_cu_seqlens(cu_seq_q)
    b_start_loc_k: Tensor | None = b_start_loc
    b_seq_len_k = b_seq_len
    if block_table is not None:
        b_start_loc_k = None
    elif cu_seq_k is not None and cu_seq_k is not cu_seq_q:
        b_start_loc_k, b_seq_len_k = varlen.from_cu_seqlens(cu_seq_k)
    return attention(
        query, key, value, b_start_loc, b_seq_len, max_q, False, scale,
        b_start_loc_k, b_seq_len_k if seqused_k is None else seqused_k, max_k,
        window_size=window_size, return_lse=return_aux is not None and return_aux.lse, block_table=block_table,
    )  # fmt: skip


def varlen_attn_out(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    *,
    return_aux: "AuxRequest | None" = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """`varlen_attn`, but that the result is copied into `out`, as `torch.nn.attention.varlen.varlen_attn_out` does.

    Args:
        out: (total_q, Hq, Dv), of query's dtype and device, any strides. It may be query itself.

    Returns:
        out, or (out, lse).

    Raises:
        As `varlen_attn`; ValueError and TypeError for an out of another shape, device or dtype; NotImplementedError
        where a gradient is asked for.
    """
    if not isinstance(out, Tensor):
        raise TypeError(f"out: {type(out).__name__} given; accepted is a Tensor")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (out, query, key, value)):
        raise NotImplementedError(
            "out: given where a gradient is asked for; varlen_attn_out has no backward, call it under torch.no_grad(), "
            "or varlen_attn"
        )
    checks.check_out(out, query, value)
    result = varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux=return_aux, scale=scale,
        window_size=window_size, enable_gqa=enable_gqa, seqused_k=seqused_k, block_table=block_table,
        num_splits=num_splits,
    )  # fmt: skip
    attended, *lse = result if isinstance(result, tuple) else (result,)
    out.copy_(attended)
    return (out, *lse) if lse else out


def _check_cache(
    cu_seq_q: Tensor, cu_seq_k: Tensor | None, seqused_k: Tensor | None, block_table: Tensor | None
) -> None:
    """Keys are found by cu_seq_k, or by block_table and seqused_k."""
    if block_table is None and cu_seq_k is None:
        raise ValueError("cu_seq_k: None given without block_table; accepted are a Tensor, or None for a paged cache")
    if cu_seq_k is not None and cu_seq_k.shape != cu_seq_q.shape:
        raise ValueError(f"cu_seq_k: shape {tuple(cu_seq_k.shape)} given; expected cu_seq_q's, {tuple(cu_seq_q.shape)}")
    if block_table is not None and seqused_k is None:
        raise ValueError("seqused_k: None given with block_table; a paged cache needs the keys of each sequence, (B,)")


def _threshold_tensor(threshold: Tensor | float | None, q: Tensor) -> Tensor | None:
    if threshold is None or isinstance(threshold, Tensor):
        return threshold
    if isinstance(threshold, bool) or not isinstance(threshold, (float, int)):
        raise TypeError(
            f"skip_softmax_threshold: {type(threshold).__name__} given; accepted are a Tensor, a float and None"
        )
    if threshold == 0.0:
        return None
    if not threshold > 0.0:
        raise ValueError(
            f"skip_softmax_threshold: {threshold} given; accepted are floats in (0, 1), and None or 0.0 for dense "
            "attention"
        )
    if threshold >= 1.0:
        warnings.warn(
            f"skip_softmax_threshold: {threshold} given; from 1 on nothing is dropped: this is dense attention",
            stacklevel=3,
        )
        return None
    return torch.full((), threshold, dtype=torch.float32, device=q.device)


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As SDPA: under autocast, 16- and 32-bit floating point tensors become the autocast dtype, others stay."""
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) if t.dtype in checks.DTYPES else t for t in tensors)


def _refuse_forward_mode(*tensors: Tensor) -> None:
    """The autograd of custom ops would return zero tangents without a word."""
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise NotImplementedError("q, k, v: forward-mode differentiation is not supported; use reverse mode")

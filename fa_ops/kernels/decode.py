"""Decoding: sequences of one query row, whose keys several programs share (Flash-Decoding), and the step that combines.

The query heads of a key head are the rows of a tile, so its keys are loaded once for all of them. The keys that the row
sees are dealt out to `num_splits` programs in equal parts; each leaves the out and lse of its part, in float32:

    lse = log(sum over splits of exp(lse_s)),  out = sum over splits of exp(lse_s - lse) out_s.

With skip-softmax (skip.py) parts are whole segments of DECODE_SEGMENT keys. Since each begins with the maximum of the
first visited block, which all programs compute, no decision depends on the number of parts. Each head decides for
itself: the values of a block are loaded if one of them keeps it.
"""

import triton
import triton.language as tl

from fa_ops.kernels.forward import _accumulate, _scores
from fa_ops.kernels.primitives import (
    COUNTS,
    LOG2E,
    SCAN_BLOCK,
    clamp_range,
    find_keys,
    key_range,
    load_keys,
    load_rows,
    score_scales,
)
from fa_ops.kernels.skip import DECODE_SEGMENT, load_log_threshold, mark_kept, sees_block

SPLIT_BLOCK = tl.constexpr(16)


@triton.jit
def _load_scores(
    q, offs_m, n0, start_k, len_k, k_ptr, key_mask_ptr, block_table_ptr, cap_scale, window_left, window_right,
    stride_kb, stride_kt, stride_ms, page_size, num_pages, stride_pn,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_KEY_MASK: tl.constexpr, PAGING: tl.constexpr,
):  # fmt: skip
    """Masked scores of the keys [n0, n0 + BLOCK_N), and what finds their values: page, row, is_key."""
    offs_n = tl.arange(0, BLOCK_N)
    is_key = n0 + offs_n < len_k
    page, row = find_keys(block_table_ptr, start_k, n0, offs_n, is_key, page_size, num_pages, stride_pn, PAGING)
    if HAS_KEY_MASK:
        is_key = tl.load(key_mask_ptr + (row + offs_n) * stride_ms, mask=is_key, other=0) != 0
    k = load_keys(
        k_ptr, stride_kb, stride_kt, page, row, offs_n, tl.arange(0, BLOCK_D), is_key, HEAD_DIM, BLOCK_D, True, PAGING
    )
    s = _scores(
        q, k, is_key, offs_m, n0 + offs_n, 1, len_k, cap_scale, window_left, window_right,
        HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_KEY_MASK, True,
    )  # fmt: skip
    return s, page, row, is_key


@triton.jit(do_not_specialize=COUNTS)
def attention_decode_kernel(
    q_ptr, k_ptr, v_ptr, part_out_ptr, part_lse_ptr,
    b_start_loc_ptr, b_seq_len_ptr, b_start_loc_k_ptr, b_seq_len_k_ptr, key_mask_ptr, block_table_ptr,
    threshold_ptr, block_bits_ptr, counts_ptr,
    softmax_scale, softcap, window_left, window_right, num_seqs, rows_q, rows_k, page_size, num_pages,
    stride_qb, stride_qt, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
    stride_mb, stride_ms, stride_pb, stride_pn, stride_tb, stride_th, stride_bh, stride_bt,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    IS_PACKED: tl.constexpr, HAS_KEY_MASK: tl.constexpr, PAGING: tl.constexpr,
    SKIP_SOFTMAX: tl.constexpr, SKIP_BLOCK_Q: tl.constexpr, VISIT_ORDER: tl.constexpr,
):  # fmt: skip
    """Grid (B, Hkv, splits). Writes part_out (splits, B, Hq, Dv) and part_lse (splits, B, Hq) of sequences of one row;
    out of a part that sees no key is left as it is."""
    seq = tl.program_id(0)
    start_q, len_q = clamp_range(tl.load(b_start_loc_ptr + seq), tl.load(b_seq_len_ptr + seq), rows_q)
    if len_q != 1:
        return
    start_k = tl.cast(0, tl.int64)
    if PAGING == 0:
        start_k = tl.load(b_start_loc_k_ptr + seq)
    start_k, len_k = clamp_range(start_k, tl.load(b_seq_len_k_ptr + seq), rows_k)

    batch = seq.to(tl.int64)
    head_kv = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    if PAGING:
        k_ptr += head_kv * stride_kh
        v_ptr += head_kv * stride_vh
        block_table_ptr += batch * stride_pb
    else:
        k_ptr += batch * stride_kb + head_kv * stride_kh
        v_ptr += batch * stride_vb + head_kv * stride_vh
    if HAS_KEY_MASK:
        key_mask_ptr += batch * stride_mb

    offs_h = tl.arange(0, BLOCK_M)
    is_head = offs_h < GROUP_SIZE
    head = head_kv * GROUP_SIZE + tl.minimum(offs_h, GROUP_SIZE - 1)
    offs_m = offs_h * 0  # each head's row is the sequence's first
    q_ptr += batch * stride_qb + start_q * stride_qt + head_kv * GROUP_SIZE * stride_qh
    q = load_rows(q_ptr, stride_qh, offs_h, tl.arange(0, BLOCK_D), is_head, HEAD_DIM, BLOCK_D, True)
    cap_scale, scale = score_scales(softmax_scale, softcap, HAS_SOFTCAP)
    positive_scale = tl.maximum(scale, 1e-30)  # 0 * -inf is NaN

    begin, _, _, end = key_range(0, 1, len_k, window_left, window_right, 1, BLOCK_N, HAS_LEFT, HAS_RIGHT)
    if SKIP_SOFTMAX and HAS_KEY_MASK:
        # counting.visited_range, here since the blocks decide where block_bits are written (see primitives.py)
        while (begin < end) & (not sees_block(
            offs_m, begin, start_k, 1, len_k, key_mask_ptr, window_left, window_right, stride_ms,
            BLOCK_N, HAS_LEFT, HAS_RIGHT,
        )):  # fmt: skip
            begin += BLOCK_N
        last = begin + tl.maximum(tl.cdiv(end - begin, BLOCK_N) - 1, 0) * BLOCK_N
        while (last > begin) & (not sees_block(
            offs_m, last, start_k, 1, len_k, key_mask_ptr, window_left, window_right, stride_ms,
            BLOCK_N, HAS_LEFT, HAS_RIGHT,
        )):  # fmt: skip
            last -= BLOCK_N
        end = tl.minimum(end, last + BLOCK_N)
    # the split's own keys, as blocks from n_first on
    unit: tl.constexpr = DECODE_SEGMENT if SKIP_SOFTMAX else BLOCK_N
    first_unit = begin // unit
    share = tl.cdiv(tl.maximum(tl.cdiv(end, unit) - first_unit, 0), tl.num_programs(2))
    n_first = tl.maximum(begin, (first_unit + split * share) * unit)
    n_end = tl.minimum(end, (first_unit + (split + 1) * share) * unit)
    count = tl.cdiv(tl.maximum(n_end - n_first, 0), BLOCK_N)

    offs_n = tl.arange(0, BLOCK_N)
    offs_dv = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    if SKIP_SOFTMAX:
        is_ascending: tl.constexpr = VISIT_ORDER < 2
        log_threshold = load_log_threshold(threshold_ptr + batch * stride_tb + head * stride_th)
        tile_q = batch
        if IS_PACKED:  # skip.first_tile, here for the same reason
            tile_q = tl.cast(0, tl.int64)
            for scanned in tl.range(0, seq, SCAN_BLOCK):
                offs = scanned + tl.arange(0, SCAN_BLOCK)
                length = tl.load(b_seq_len_ptr + offs, mask=offs < seq, other=0)
                length = tl.minimum(tl.maximum(length.to(tl.int64), 0), rows_q)
                tile_q += tl.sum(tl.cdiv(length, SKIP_BLOCK_Q), 0)
        bits_ptr = block_bits_ptr + head * stride_bh + tile_q * stride_bt
        n_visited_first = begin
        if VISIT_ORDER == 1 or VISIT_ORDER == 3:
            n_visited_first = begin + tl.maximum(tl.cdiv(end - begin, BLOCK_N) - 1, 0) * BLOCK_N
        m_first = m_i
        if count > 0:
            s, page, row, is_key = _load_scores(
                q, offs_m, n_visited_first, start_k, len_k, k_ptr, key_mask_ptr, block_table_ptr, cap_scale,
                window_left, window_right, stride_kb, stride_kt, stride_ms, page_size, num_pages, stride_pn,
                HEAD_DIM, BLOCK_D, BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_KEY_MASK, PAGING,
            )  # fmt: skip
            m_first = tl.max(s, 1)
        m_before = m_first
        segment = -1
        num_visited = tl.zeros([BLOCK_M], tl.int32)
        num_dropped = tl.zeros([BLOCK_M], tl.int32)
        for step in tl.range(0, count):
            n0 = n_first + (step if is_ascending else count - 1 - step) * BLOCK_N
            s, page, row, is_key = _load_scores(
                q, offs_m, n0, start_k, len_k, k_ptr, key_mask_ptr, block_table_ptr, cap_scale,
                window_left, window_right, stride_kb, stride_kt, stride_ms, page_size, num_pages, stride_pn,
                HEAD_DIM, BLOCK_D, BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_KEY_MASK, PAGING,
            )  # fmt: skip
            s_max = tl.max(s, 1)
            has_vote = (s_max != float("-inf")) & is_head
            if n0 // DECODE_SEGMENT != segment:
                m_before = m_first
                segment = n0 // DECODE_SEGMENT
            is_dropped = ((s_max - m_before) * positive_scale < log_threshold) & (n0 != n_visited_first)
            is_kept = has_vote & (is_dropped == 0)
            m_before = tl.maximum(m_before, tl.where(has_vote, s_max, float("-inf")))
            num_visited += has_vote.to(tl.int32)
            num_dropped += (has_vote & is_dropped).to(tl.int32)
            if tl.max(is_kept.to(tl.int32), 0) != 0:
                v = load_keys(
                    v_ptr, stride_vb, stride_vt, page, row, offs_n, offs_dv, is_key, HEAD_DIM_V, BLOCK_DV, True, PAGING
                )
                s = tl.where(is_kept[:, None], s, float("-inf"))
                s_max = tl.where(is_kept, s_max, float("-inf"))
                acc, l_i, m_i = _accumulate(acc, l_i, m_i, s, s_max, v, positive_scale, True)
                mark_kept(bits_ptr, n0 // BLOCK_N, is_kept)
        counts_ptr += batch * tl.num_programs(1) * GROUP_SIZE + head
        tl.atomic_add(counts_ptr, num_visited.to(tl.int64), mask=is_head)
        counts_ptr += tl.cast(num_seqs, tl.int64) * tl.num_programs(1) * GROUP_SIZE
        tl.atomic_add(counts_ptr, num_dropped.to(tl.int64), mask=is_head)
    else:
        for n0 in tl.range(n_first, n_end, BLOCK_N):
            s, page, row, is_key = _load_scores(
                q, offs_m, n0, start_k, len_k, k_ptr, key_mask_ptr, block_table_ptr, cap_scale,
                window_left, window_right, stride_kb, stride_kt, stride_ms, page_size, num_pages, stride_pn,
                HEAD_DIM, BLOCK_D, BLOCK_N, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_KEY_MASK, PAGING,
            )  # fmt: skip
            v = load_keys(
                v_ptr, stride_vb, stride_vt, page, row, offs_n, offs_dv, is_key, HEAD_DIM_V, BLOCK_DV, True, PAGING
            )
            acc, l_i, m_i = _accumulate(acc, l_i, m_i, s, tl.max(s, 1), v, positive_scale, True)

    is_empty = l_i == 0.0
    l_i = tl.where(is_empty, 1.0, l_i)
    # fused by name: left to ptxas, the bits would depend on what else the kernel was compiled for
    lse = tl.where(is_empty, float("-inf"), tl.fma(m_i, scale, tl.log(l_i)))
    part = (split.to(tl.int64) * num_seqs + batch) * tl.num_programs(1) * GROUP_SIZE + head
    tl.store(part_lse_ptr + part, lse, mask=is_head)
    part_ptrs = part_out_ptr + part[:, None] * HEAD_DIM_V + offs_dv[None, :]
    has_out = is_head & (is_empty == 0)
    tl.store(part_ptrs, acc / l_i[:, None], mask=has_out[:, None] & (offs_dv < HEAD_DIM_V)[None, :])


@triton.jit(do_not_specialize=COUNTS)
def attention_combine_kernel(
    part_out_ptr, part_lse_ptr, out_ptr, lse_ptr, b_start_loc_ptr, b_seq_len_ptr, sinks_ptr, num_seqs, rows_q,
    num_splits, stride_ob, stride_ot, stride_oh, stride_lb, stride_lh,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_SINKS: tl.constexpr, IS_PACKED: tl.constexpr,
):  # fmt: skip
    """Grid (B, Hq). Writes out and lse of sequences of one row, and in the padded layout, of one row, what is none."""
    seq = tl.program_id(0)
    start_q, len_q = clamp_range(tl.load(b_start_loc_ptr + seq), tl.load(b_seq_len_ptr + seq), rows_q)
    if IS_PACKED:
        if len_q != 1:
            return
    has_row = len_q == 1
    batch = seq.to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    offs_dv = tl.arange(0, BLOCK_DV)
    acc = tl.zeros([BLOCK_DV], tl.float32)
    l_i = 0.0
    m_i = float("-inf")
    for first in tl.range(0, tl.where(has_row, num_splits, 0), SPLIT_BLOCK):
        split = (first + tl.arange(0, SPLIT_BLOCK)).to(tl.int64)
        part = (split * num_seqs + batch) * tl.num_programs(1) + head
        lse = tl.load(part_lse_ptr + part, mask=split < num_splits, other=float("-inf"))
        has_out = lse != float("-inf")
        part_ptrs = part_out_ptr + part[:, None] * HEAD_DIM_V + offs_dv[None, :]
        out = tl.load(part_ptrs, mask=has_out[:, None] & (offs_dv < HEAD_DIM_V)[None, :], other=0.0)
        m_new = tl.maximum(m_i, tl.max(lse, 0))
        m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2((m_i - m_finite) * LOG2E)
        weight = tl.exp2((lse - m_finite) * LOG2E)
        l_i = l_i * alpha + tl.sum(weight, 0)
        acc = acc * alpha + tl.sum(weight[:, None] * out, 0)
        m_i = m_new
    if HAS_SINKS:
        # one more score, with no value
        sink = tl.load(sinks_ptr + head).to(tl.float32)
        m_new = tl.maximum(m_i, sink)
        m_finite = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2((m_i - m_finite) * LOG2E)
        l_i = l_i * alpha + tl.exp2((sink - m_finite) * LOG2E)
        acc = acc * alpha
        m_i = m_new
    is_empty = (l_i == 0.0) | (has_row == 0)
    l_i = tl.where(is_empty, 1.0, l_i)
    row = start_q if IS_PACKED else tl.cast(0, tl.int64)
    out = tl.where(is_empty, 0.0, acc / l_i)
    out_ptr += batch * stride_ob + row * stride_ot + head * stride_oh
    tl.store(out_ptr + offs_dv, out.to(out_ptr.dtype.element_ty), mask=offs_dv < HEAD_DIM_V)
    lse_ptr += batch * stride_lb + head * stride_lh + row
    tl.store(lse_ptr, tl.where(is_empty, float("-inf"), m_i + tl.log(l_i)))

"""What every kernel shares: where a tile lies, which keys a row sees, which blocks need a mask.

Notation: a sequence has `len_q` query rows and `len_k` keys, both counted from its own first one; `m` runs over query
rows, `n` over keys, `d` over the head dimension. Row m stands at the key position m + len_k - len_q (bottom-right
alignment) and sees the keys from window_left before it to window_right after it; causal attention is window_right = 0.
A side without HAS_LEFT or HAS_RIGHT is unlimited.

torch.compile asks what a kernel stores to, and walks back from each address: up to loads, and through the calls of
functions into all their arguments. Where a load decides an address, it therefore stands in the kernel itself: inside
a function called with the pointer, it would pass for a write to that tensor.

One addressing rule serves both layouts: a row lies at `batch * stride_b + (start + m) * stride_t + head * stride_h`,
where packed tensors have stride_b = 0. In a paged cache (PAGING) stride_b is that of a page, and a table names the page
of each `page_size` keys of a sequence.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
SCAN_BLOCK = tl.constexpr(128)
CLEAR_ROWS = tl.constexpr(64)
CLEAR_SCAN = tl.constexpr(256)
CLEAR_PART = tl.constexpr(16)
PART = tl.constexpr(16)

# Arguments that count something, and so differ from call to call: no kernel is compiled anew because one of them is 1
# or a multiple of 16.
COUNTS = (
    "num_seqs", "rows_q", "rows_k", "window_left", "window_right",
    "stride_lb", "stride_lh", "stride_dlb", "stride_dlh", "stride_dlt", "stride_mb", "stride_ms",
    "stride_tb", "stride_th", "stride_bh", "stride_bt", "num_pages", "num_splits", "stride_pb", "stride_pn",
)  # fmt: skip


@triton.jit
def clamp_range(start, length, rows):
    """First row and length of a sequence inside the tensor's `rows` rows: no value read there leads outside."""
    start = tl.minimum(tl.maximum(start.to(tl.int64), 0), rows)
    length = tl.minimum(tl.maximum(length.to(tl.int64), 0), rows - start)
    return start, length.to(tl.int32)


@triton.jit
def padded_tile(tile, rows, BLOCK: tl.constexpr):
    """Sequence of a tile, the tile's index in it, and the sequence's number of tiles: the same for every sequence."""
    count = tl.cdiv(rows, BLOCK)
    return tile // count, tile % count, count


@triton.jit
def scan_lengths(length, tile, seq, first, end, rows, BLOCK: tl.constexpr):
    """One step of the search for a packed tile, over the next SCAN_BLOCK lengths. The tiles of all sequences are
    numbered in a row; carried along are the number of sequences before the tile, the first tile behind these, and the
    first behind those scanned. Also returns the number of tiles of the sequence, if it is found here."""
    length = tl.minimum(tl.maximum(length.to(tl.int64), 0), rows).to(tl.int32)
    ends = end + tl.cumsum(tl.cdiv(length, BLOCK), 0)
    is_before = ends <= tile
    seq += tl.sum(is_before.to(tl.int32), 0)
    first = tl.maximum(first, tl.max(tl.where(is_before, ends, 0), 0))
    count = tl.min(tl.where(is_before, 2147483647, ends), 0) - first
    return seq, first, tl.max(ends, 0), count


@triton.jit
def ranges_in_piece(seq, row, b_start_loc_ptr, b_seq_len_ptr, num_seqs, rows):
    """(begin, end) of sequences among the CLEAR_ROWS rows from `row` on, counted from there; equal if none."""
    start = tl.load(b_start_loc_ptr + seq, mask=seq < num_seqs, other=0)
    length = tl.load(b_seq_len_ptr + seq, mask=seq < num_seqs, other=0)
    start, length = clamp_range(start, length, rows)
    begin = tl.minimum(tl.maximum(start - row, 0), CLEAR_ROWS).to(tl.int32)
    end = tl.minimum(tl.maximum(start + length - row, 0), CLEAR_ROWS).to(tl.int32)
    return begin, end


@triton.jit
def find_unowned(row, b_start_loc_ptr, b_seq_len_ptr, num_seqs, rows):
    """Which of the CLEAR_ROWS rows of a packed tensor from `row` on belong to no sequence; ranges may overlap. Of
    CLEAR_SCAN sequences looks for those that have rows there, and then at the rows of CLEAR_PART of them at a time,
    for which there are registers."""
    offs = tl.arange(0, CLEAR_ROWS)
    offs_seq = tl.arange(0, CLEAR_SCAN)
    is_unowned = row + offs < rows
    scanned = 0
    while (scanned < num_seqs) & (tl.max(is_unowned.to(tl.int32), 0) != 0):
        begin, end = ranges_in_piece(scanned + offs_seq, row, b_start_loc_ptr, b_seq_len_ptr, num_seqs, rows)
        first = scanned + tl.min(tl.where(begin < end, offs_seq, CLEAR_SCAN), 0)
        last = scanned + tl.max(tl.where(begin < end, offs_seq, -1), 0)
        for part in tl.range(first, last + 1, CLEAR_PART):
            seq = part + tl.arange(0, CLEAR_PART)
            own_begin, own_end = ranges_in_piece(seq, row, b_start_loc_ptr, b_seq_len_ptr, num_seqs, rows)
            is_owned = (own_begin[:, None] <= offs[None, :]) & (offs[None, :] < own_end[:, None])
            is_unowned = is_unowned & (tl.max(is_owned.to(tl.int32), 0) == 0)
        scanned += CLEAR_SCAN
    return is_unowned


@triton.jit
def wrap_rows(first, offs, rows, IS_PACKED: tl.constexpr):
    """Offsets from the row `first` of a tile. Padded: rows past the batch row's end wrap to its begin, so that the
    tiles of a sequence cover each of the `rows` rows once, padding included."""
    if IS_PACKED:
        return offs
    else:
        return tl.where(offs >= rows - first, offs - rows, offs)


@triton.jit
def is_visible(
    offs_m, offs_n, len_q, len_k, window_left, window_right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):
    """The masking rule; offs_m and offs_n broadcast against each other."""
    visible = offs_n < len_k
    position = offs_m + (len_k - len_q)
    if HAS_LEFT:
        visible = visible & (offs_n >= position - window_left)
    if HAS_RIGHT:
        visible = visible & (offs_n <= position + window_right)
    return visible


@triton.jit
def sees_keys(offs_m, len_q, len_k, window_left, window_right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr):
    """Whether a row sees a key of its sequence, holes aside."""
    sees = offs_m < len_q
    position = offs_m + (len_k - len_q)
    if HAS_LEFT:
        sees = sees & (position - window_left < len_k)
    if HAS_RIGHT:
        sees = sees & (position + window_right >= 0)
    return sees


@triton.jit
def key_range(
    m0, len_q, len_k, window_left, window_right,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """Keys for the query rows from m0 on, as block starts (begin, full, full_end, end): the blocks in [full, full_end)
    are seen whole by every row, those in [begin, full) and [full_end, end) in part, the rest by none."""
    offset = len_k - len_q
    begin = 0
    full = 0
    full_end = len_k
    end = len_k
    if HAS_LEFT:
        begin = tl.maximum(m0 + offset - window_left, 0) // BLOCK_N * BLOCK_N
        last = tl.minimum(m0 + BLOCK_M, len_q) - 1
        full = tl.cdiv(tl.maximum(last + offset - window_left, 0), BLOCK_N) * BLOCK_N
    if HAS_RIGHT:
        full_end = tl.maximum(tl.minimum(m0 + offset + window_right + 1, len_k), 0)
        end = tl.maximum(tl.minimum(tl.minimum(m0 + BLOCK_M, len_q) + offset + window_right, len_k), 0)
    full = tl.minimum(full, end)
    return begin, full, tl.maximum(full_end // BLOCK_N * BLOCK_N, full), end


@triton.jit
def query_range(
    n0, len_q, len_k, window_left, window_right,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """Query rows for the keys from n0 on: the counterpart of `key_range`."""
    offset = len_k - len_q
    begin = 0
    full = 0
    full_end = len_q
    end = len_q
    if HAS_RIGHT:
        begin = tl.maximum(n0 - offset - window_right, 0) // BLOCK_M * BLOCK_M
        last = tl.minimum(n0 + BLOCK_N, len_k) - 1
        full = tl.cdiv(tl.maximum(last - offset - window_right, 0), BLOCK_M) * BLOCK_M
    if HAS_LEFT:
        full_end = tl.maximum(tl.minimum(n0 - offset + window_left + 1, len_q), 0)
        end = tl.maximum(tl.minimum(tl.minimum(n0 + BLOCK_N, len_k) - offset + window_left, len_q), 0)
    full = tl.minimum(full, end)
    return begin, full, tl.maximum(full_end // BLOCK_M * BLOCK_M, full), end


@triton.jit
def tanh(x):
    """Accurate to a few ulp; Triton has none of its own that the interpreter knows."""
    square = x * x
    series = x * (1.0 + square * (-0.33333333 + square * (0.13333333 + square * (-0.053968254 + square * 0.021869488))))
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    value = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0.0, -value, value))


@triton.jit
def tanh_derivative(x):
    """1 - tanh(x)^2, without the cancellation."""
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    return 4.0 * decay / ((1.0 + decay) * (1.0 + decay))


@triton.jit
def score_scales(softmax_scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """(cap_scale, scale): a score is scale * s with s = q k, or s = tanh(cap_scale * q k) under a softcap. Scalars come
    as float64 from Inductor."""
    scale = tl.cast(softmax_scale, tl.float32)
    cap_scale = 1.0
    if HAS_SOFTCAP:
        cap_scale = scale / tl.cast(softcap, tl.float32)
        scale = tl.cast(softcap, tl.float32)
    return cap_scale, scale


@triton.jit
def dot_rows(a, b):
    """a b^T, summed over the head dimension. In float32 PART columns at a time, for the reason that `add_dot` gives."""
    if a.dtype == tl.float32 and a.shape[1] > PART:
        a = tl.permute(tl.reshape(a, (a.shape[0], a.shape[1] // PART, PART)), (1, 0, 2))
        b = tl.permute(tl.reshape(b, (b.shape[0], b.shape[1] // PART, PART)), (1, 2, 0))
        return tl.sum(tl.dot(a, b, input_precision="ieee"), 0)
    else:
        return tl.dot(a, tl.trans(b), input_precision="ieee")


@triton.jit
def add_dot(acc, a, b):
    """acc + a b. In float32 each product is summed on its own first, since one chain of thousands of sums loses digits;
    the signs keep the compiler from folding it into the chain."""
    if a.dtype == tl.float32:
        return acc - tl.dot(-a, b, input_precision="ieee")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def load_rows(
    base_ptr, stride_t, offs, offs_d, row_mask, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr
):
    """A (rows, BLOCK_D) tile, zero where `row_mask` (read only if MASKED) is false and past the head dimension."""
    ptrs = base_ptr + offs.to(tl.int64)[:, None] * stride_t + offs_d[None, :]
    if MASKED:
        if HEAD_DIM == BLOCK_D:
            return tl.load(ptrs, mask=row_mask[:, None], other=0.0)
        else:
            return tl.load(ptrs, mask=row_mask[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)
    else:
        if HEAD_DIM == BLOCK_D:
            return tl.load(ptrs)
        else:
            return tl.load(ptrs, mask=(offs_d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def find_keys(
    block_table_ptr, start_k, n0, offs_n, is_key, page_size, num_pages, stride_pn, PAGING: tl.constexpr
):  # fmt: skip
    """(page, row) of the keys [n0, n0 + BLOCK_N). PAGING 0: no pages, the first key's row. 1: one page holds them all,
    and the first key's row in it. 2: the page and the row in it of each key, as columns. `block_table_ptr` is the
    sequence's row of the table; no number in it leads outside of the cache, and none behind the last key is read."""
    if PAGING == 0:
        return 0, start_k + n0
    elif PAGING == 1:
        entry = n0 // page_size
        page = tl.load(block_table_ptr + entry.to(tl.int64) * stride_pn).to(tl.int64)
        return tl.minimum(tl.maximum(page, 0), num_pages - 1), n0 - entry * page_size
    else:
        entry = (n0 + offs_n) // page_size
        page = tl.load(block_table_ptr + entry.to(tl.int64) * stride_pn, mask=is_key, other=0).to(tl.int64)
        page = tl.minimum(tl.maximum(page, 0), num_pages - 1)
        return page[:, None], (n0 + offs_n - entry * page_size)[:, None]


@triton.jit
def load_keys(
    base_ptr, stride_b, stride_t, page, row, offs_n, offs_d, is_key,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr, PAGING: tl.constexpr,
):  # fmt: skip
    """A (BLOCK_N, BLOCK_D) tile of the keys, or of their values, that `find_keys` found."""
    if PAGING == 0:
        return load_rows(base_ptr + row * stride_t, stride_t, offs_n, offs_d, is_key, HEAD_DIM, BLOCK_D, MASKED)
    elif PAGING == 1:
        base_ptr += page * stride_b + row.to(tl.int64) * stride_t
        return load_rows(base_ptr, stride_t, offs_n, offs_d, is_key, HEAD_DIM, BLOCK_D, MASKED)
    else:
        base_ptr += page * stride_b + row.to(tl.int64) * stride_t
        return load_rows(base_ptr, 0, offs_n, offs_d, is_key, HEAD_DIM, BLOCK_D, MASKED)


@triton.jit
def load_own_rows(base_ptr, stride_t, first, offs, rows, offs_d, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile whose rows nothing is summed over: what lies behind the sequence is loaded as it is, NaN or not, and
    dropped at the end. A mask would cost registers."""
    offs = tl.minimum(offs, (rows - 1 - first).to(tl.int32))
    return load_rows(base_ptr + first * stride_t, stride_t, offs, offs_d, offs, HEAD_DIM, BLOCK_D, False)


@triton.jit
def store_rows(base_ptr, stride_t, offs, offs_d, tile, row_mask, HEAD_DIM: tl.constexpr):
    """Stores a (rows, BLOCK_D) tile where `row_mask` is true."""
    ptrs = base_ptr + offs.to(tl.int64)[:, None] * stride_t + offs_d[None, :]
    tl.store(ptrs, tile.to(base_ptr.dtype.element_ty), mask=row_mask[:, None] & (offs_d < HEAD_DIM)[None, :])


@triton.jit
def fill_rows(
    base_ptr, stride_t, stride_h, offs, is_row, heads,
    VALUE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Stores VALUE to all heads of the rows `offs`, of whom there are CLEAR_ROWS, where `is_row` is true."""
    if tl.max(is_row.to(tl.int32), 0) != 0:
        tile = tl.full([CLEAR_ROWS, BLOCK_D], VALUE, tl.float32)
        for head in range(heads):
            store_rows(
                base_ptr + tl.cast(head, tl.int64) * stride_h, stride_t, offs, tl.arange(0, BLOCK_D), tile, is_row,
                HEAD_DIM,
            )  # fmt: skip

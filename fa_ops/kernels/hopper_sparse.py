"""The forward for sm_90 with skip-softmax: the roles and barriers of hopper.py, the definition of skip.py.

A warp group owns a block of 64 query rows and decides for them alone. It visits the first key block, then from the last
one downwards. Beside each other run the scores and the softmax of a block and the product of the block kept before it;
whether it is kept is asked behind both, and if it is not, its softmax was for nothing. From then on a block that is
dropped ends at its row maxima: the scores of the next one follow, alone, until one is kept:

    scores and softmax of the first block
    while there are more blocks:
        scores and softmax of the next block, beside the product of the block that the last softmax was of
        if it is not kept:
            while it is not and there are more: scores of the next block; is it kept?
            softmax of the block, if it is kept
    product of the last block, if it is kept

All warp groups of a tile go through the blocks of all its rows. One that none of a warp group's own rows sees has no
votes, so it is not kept; nor is it counted.

Sparsity differs from head to head, so programs take tiles by a counter: the producer does, and tells the warp groups
through `tile_smem`, two slots with a barrier each, tile_full (1 arrival). Tiles without blocks are not told of.

The barriers of Q, K and V are those of hopper.py, where K and V have slots of their own number and two differ:

    k_empty[s] a warp group arrives once its warps have voted on the slot's block, and have written their votes down in
               `votes_smem`; so the producer knows of K_STAGES blocks before the one that it asks K for
    v_full[s]  where no warp group wants the block, the producer arrives and copies nothing

The producer asks for V of block i after K of block i + K_STAGES - 1, so it knows whether block i - 1 was wanted. If it
was, V is asked for at once, as in dense attention; if not, the producer waits for the decisions on block i first.

Nobody waits for what lies ahead: the decision on a block needs its own K and the V before it; V needs the decisions on
its own block, K ahead those on the block before it, and both the product of block i - V_STAGES, which ends when V of
the block after that is there.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fa_ops.kernels import hopper, primitives, skip, tiles

BITS_PER_WORD = gl.constexpr(skip.BITS_PER_WORD.value)
DECODE_SEGMENT = gl.constexpr(skip.DECODE_SEGMENT.value)
LOG2E = gl.constexpr(primitives.LOG2E.value)
RECORD = gl.constexpr(tiles.RECORD.value)
ROWS = gl.constexpr(hopper.ROWS.value)
CONSUMERS = gl.constexpr(2)

_allocate_out = hopper._allocate_out
_column = hopper._column
_copy = hopper._copy
_copy_out = hopper._copy_out
_locate = hopper._locate
_operand = hopper._operand
_pack = hopper._pack
_rows = hopper._rows
_store_out = hopper._store_out
_take_number = hopper._take_number
is_visible = hopper.is_visible
key_range = gluon.jit(primitives.key_range.fn)
load_log_threshold = gluon.jit(skip.load_log_threshold.fn)
row_margins = gluon.jit(skip.row_margins.fn)
visit = gluon.jit(skip.visit.fn)


@gluon.jit
def _allocate_tile_slots():
    smem = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(2):
        mbarrier.init(full.index(slot), count=1)
    return smem, full


@gluon.jit
def _give(t, tile_smem, tile_full, tiles):
    """Tells the warp groups of the next tile and head, in the place of the last but one, which they have left."""
    slot = tiles % 2
    tile_smem.index(slot).store(gl.full([1], t, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
    mbarrier.arrive(tile_full.index(slot))


@gluon.jit
def _take(tile_smem, tile_full, tiles):
    slot = tiles % 2
    mbarrier.wait(tile_full.index(slot), (tiles // 2) & 1)
    return gl.max(tile_smem.index(slot).load(gl.BlockedLayout([1], [32], [4], [0])), 0)


@gluon.jit
def _is_kept(votes_smem, slot, CONSUMER: gl.constexpr, NUM_WARPS: gl.constexpr):
    """Whether a warp of the warp group voted for the block in this slot of K; asked by NUM_WARPS warps."""
    votes = votes_smem.index(slot * CONSUMERS + CONSUMER).slice(0, 1)
    votes = votes.load(gl.BlockedLayout([1, 4], [32, 1], [NUM_WARPS, 1], [1, 0]))
    return gl.max(gl.reshape(votes, [4]), 0) != 0


@gluon.jit
def _is_wanted(votes_smem, slot):
    """Whether a warp group keeps the block in this slot of K."""
    is_wanted = False
    for c in gl.static_range(CONSUMERS):
        is_wanted = is_wanted | _is_kept(votes_smem, slot, c, 1)
    return is_wanted


@gluon.jit
def _vote(votes_smem, slot, keeps, CONSUMER: gl.constexpr):
    """Writes down whether a warp's rows vote for the values of the block in this slot of K.

    A warp has 16 of the rows, a thread two of them: they vote in one instruction, where a maximum over rows would take
    three shuffles.
    """
    votes = gl.inline_asm_elementwise(
        """{
            .reg .pred p;
            .reg .b32 t;
            or.b32 t, $2, $3;
            setp.ne.b32 p, t, 0;
            vote.sync.any.pred p, p, 0xffffffff;
            selp.b32 $0, 1, 0, p;
            mov.b32 $1, $0;
        }""",
        "=r,=r,r,r", [keeps.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=2,
    )  # fmt: skip
    votes_smem.index(slot * CONSUMERS + CONSUMER).store(gl.permute(gl.reshape(votes, [4, 16]), [1, 0]))


@gluon.jit
def _release_key(k_empty, votes_smem, slot, CONSUMER: gl.constexpr):
    """The scores are there, and the votes are cast. Returns whether there is one."""
    is_kept = _is_kept(votes_smem, slot, CONSUMER, 4)
    mbarrier.arrive(k_empty.index(slot))
    return is_kept


@gluon.jit
def _produce(
    shared, tile_slots, work, inputs, BLOCK_N: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    VISIT_ORDER: gl.constexpr,
):  # fmt: skip
    q_smem, k_smem, v_smem, votes_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty = shared
    tile_smem, tile_full = tile_slots
    tiles_ptr, next_ptr, num_tiles, heads = work
    q_desc, k_desc, v_desc, group_size, heads_at_once = inputs
    tiles = 0
    blocks = 0
    is_likely = gl.program_id(0) >= 0
    t = _locate(gl.program_id(0), num_tiles, heads, heads_at_once)
    while t < num_tiles * heads:
        record_ptr = tiles_ptr + t // heads * RECORD
        head = t % heads
        head_kv = head // group_size
        m0 = gl.load(record_ptr)
        len_q = gl.load(record_ptr + 1)
        len_k = gl.load(record_ptr + 2)
        num_blocks = gl.load(record_ptr + 5) + gl.load(record_ptr + 6)
        end_q = gl.load(record_ptr + 9)
        end_k = gl.load(record_ptr + 10)
        end_v = gl.load(record_ptr + 11)
        if num_blocks > 0:
            _give(t, tile_smem, tile_full, tiles)
            for c in gl.static_range(CONSUMERS):
                mbarrier.wait(q_empty.index(c), (tiles & 1) ^ 1)
                _copy(q_desc, end_q, len_q, m0 + c * ROWS, head, q_full.index(c), q_smem.index(c))
            tiles += 1
            for step in range(num_blocks + K_STAGES - 1):
                if step < num_blocks:
                    block = blocks + step
                    slot = block % K_STAGES
                    mbarrier.wait(k_empty.index(slot), ((block // K_STAGES) & 1) ^ 1)
                    # before the first use of a slot nothing is written there: the guess may be wrong then, too
                    is_likely = _is_wanted(votes_smem, slot)
                    n0 = visit(step, num_blocks, VISIT_ORDER) * BLOCK_N
                    _copy(k_desc, end_k, len_k, n0, head_kv, k_full.index(slot), k_smem.index(slot))
                behind = step - (K_STAGES - 1)
                if behind >= 0:
                    block = blocks + behind
                    is_wanted = behind >= 0
                    if (behind > 0) & (is_likely == 0):
                        slot = block % K_STAGES
                        mbarrier.wait(k_empty.index(slot), (block // K_STAGES) & 1)
                        is_wanted = _is_wanted(votes_smem, slot)
                    slot = block % V_STAGES
                    mbarrier.wait(v_empty.index(slot), ((block // V_STAGES) & 1) ^ 1)
                    if is_wanted:
                        n0 = visit(behind, num_blocks, VISIT_ORDER) * BLOCK_N
                        _copy(v_desc, end_v, len_k, n0, head_kv, v_full.index(slot), v_smem.index(slot))
                    else:
                        mbarrier.arrive(v_full.index(slot))
            blocks += num_blocks
        # the warp groups still have blocks to go when this is asked for
        t = _take_number(next_ptr, num_tiles, heads, heads_at_once)
    _give(t, tile_smem, tile_full, tiles)


@gluon.jit
def _decide(
    s, offs_m, block, num_full, len_q, len_k, window_right, softmax_scale, log_threshold, m_before, m_first,
    layout: gl.constexpr, BLOCK_N: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """(s, whether each row keeps the block, m_before) of a block's scores, which are masked here."""
    n0 = block * BLOCK_N
    if block >= num_full:
        s = _mask(s, offs_m, n0, len_q, len_k, window_right, layout, BLOCK_N, HAS_RIGHT)
    s_max = gl.max(s, 1)
    segment = (n0 + BLOCK_N) // DECODE_SEGMENT  # of the block visited before
    margins, has_vote, m_before, _, _ = row_margins(
        s_max, offs_m, n0, len_q, softmax_scale, m_before, m_first, segment, False
    )
    return s, has_vote & ((margins < log_threshold) == 0), m_before


@gluon.jit
def _mask(
    s, offs_m, n0, len_q, len_k, window_right, layout: gl.constexpr, BLOCK_N: gl.constexpr, HAS_RIGHT: gl.constexpr
):
    offs_n = n0 + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
    visible = is_visible(
        gl.expand_dims(offs_m, 1), gl.expand_dims(offs_n, 0), len_q, len_k, -1, window_right, False, HAS_RIGHT
    )
    return gl.where(visible, s, float("-inf"))


@gluon.jit
def _softmax(s, m_before, l_i, m_i, scale_log2):
    """(P, l, m, exp(m before - m)) of a kept block's masked, unscaled scores, whose row maxima are in m_before."""
    m_new = gl.maximum(m_i, m_before)
    m_finite = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(s * scale_log2 - gl.expand_dims(m_finite * scale_log2, 1))
    alpha = gl.exp2((m_i - m_finite) * scale_log2)
    return p, l_i * alpha + gl.sum(p, 1), m_new, alpha


@gluon.jit
def _write_down(bits_row_ptr, word, num_kept, block, is_kept):
    """The word that the block's bit lies in, stored with the lowest of its blocks, and the number kept so far."""
    bit = block % BITS_PER_WORD
    word = word | (is_kept.to(gl.int32) << bit)
    if bit == 0:
        gl.store(bits_row_ptr + block // BITS_PER_WORD, word)
        word = 0
    return word, num_kept + is_kept.to(gl.int32)


@gluon.jit
def _consume(
    shared, tile_slots, work, numbers, outputs, skipping,
    CONSUMER: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, K_STAGES: gl.constexpr,
    V_STAGES: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    q_smem, k_smem, v_smem, votes_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty = shared
    tile_smem, tile_full = tile_slots
    tiles_ptr, next_ptr, num_tiles, heads = work
    softmax_scale, window_right = numbers
    out_ptr, lse_ptr, rows_q, out_desc, out_smem = outputs
    threshold_ptr, stride_tb, stride_th, block_bits_ptr, stride_bh, stride_bt, counts_ptr, num_seqs = skipping
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    q = _rows(q_smem.index(CONSUMER))
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    scale_log2 = softmax_scale * LOG2E
    tiles = 0
    blocks = 0
    t = _take(tile_smem, tile_full, tiles)
    while t < num_tiles * heads:
        record_ptr = tiles_ptr + t // heads * RECORD
        head = t % heads
        m0 = gl.load(record_ptr) + CONSUMER * ROWS
        len_q = gl.load(record_ptr + 1)
        len_k = gl.load(record_ptr + 2)
        num_full = gl.load(record_ptr + 5)
        num_blocks = num_full + gl.load(record_ptr + 6)
        seq = gl.load(record_ptr + 12)
        bits_row_ptr = block_bits_ptr + (head * stride_bh + (gl.load(record_ptr + 13) + m0 // ROWS) * stride_bt)
        log_threshold = load_log_threshold(threshold_ptr + (seq * stride_tb + head * stride_th))
        num_kept = 1
        word = 0
        offs_m = m0 + gl.arange(0, ROWS, row_layout)
        acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, out_layout)
        l_i = gl.zeros([ROWS], gl.float32, row_layout)
        m_i = gl.full([ROWS], float("-inf"), gl.float32, row_layout)

        mbarrier.wait(q_full.index(CONSUMER), tiles & 1)
        tiles += 1
        slot_k = blocks % K_STAGES
        mbarrier.wait(k_full.index(slot_k), (blocks // K_STAGES) & 1)
        s = warpgroup_mma(q, _rows(k_smem.index(slot_k)).permute((1, 0)), zeros, use_acc=False)
        _vote(votes_smem, slot_k, offs_m >= 0, CONSUMER)
        is_kept = _release_key(k_empty, votes_smem, slot_k, CONSUMER)
        s = _mask(s, offs_m, 0, len_q, len_k, window_right, s_layout, BLOCK_N, HAS_RIGHT)
        m_first = gl.max(s, 1)
        m_before = m_first
        s, l_i, m_i, alpha = _softmax(s, m_before, l_i, m_i, scale_log2)
        packed = _pack(s, v_smem.dtype)
        mbarrier.wait(v_full.index(blocks % V_STAGES), (blocks // V_STAGES) & 1)
        # the block scored last; those below it, down to 1, are left
        block = num_blocks
        while block > 1:
            block -= 1
            p = _operand(packed, out_layout, v_smem.dtype)
            slot_k = (blocks + 1) % K_STAGES
            mbarrier.wait(k_full.index(slot_k), ((blocks + 1) // K_STAGES) & 1)
            scores = warpgroup_mma(q, _rows(k_smem.index(slot_k)).permute((1, 0)), zeros, use_acc=False, is_async=True)
            product = warpgroup_mma(p, _rows(v_smem.index(blocks % V_STAGES)), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=[scores])
            blocks += 1
            s, keeps, m_before = _decide(
                s, offs_m, block, num_full, len_q, len_k, window_right, softmax_scale, log_threshold,
                m_before, m_first, s_layout, BLOCK_N, HAS_RIGHT,
            )  # fmt: skip
            _vote(votes_smem, slot_k, keeps, CONSUMER)
            s, l_new, m_new, alpha = _softmax(s, m_before, l_i, m_i, scale_log2)
            packed = _pack(s, v_smem.dtype)
            acc, p = warpgroup_mma_wait(0, deps=[product, p])
            mbarrier.arrive(v_empty.index((blocks - 1) % V_STAGES))
            is_kept = _release_key(k_empty, votes_smem, slot_k, CONSUMER)
            word, num_kept = _write_down(bits_row_ptr, word, num_kept, block, is_kept)
            if is_kept:
                acc = acc * _column(alpha, out_layout)
                l_i = l_new
                m_i = m_new
            else:
                while (is_kept == 0) & (block > 1):
                    block -= 1
                    slot_k = (blocks + 1) % K_STAGES
                    mbarrier.wait(k_full.index(slot_k), ((blocks + 1) // K_STAGES) & 1)
                    s = warpgroup_mma(q, _rows(k_smem.index(slot_k)).permute((1, 0)), zeros, use_acc=False)
                    s, keeps, m_before = _decide(
                        s, offs_m, block, num_full, len_q, len_k, window_right, softmax_scale, log_threshold,
                        m_before, m_first, s_layout, BLOCK_N, HAS_RIGHT,
                    )  # fmt: skip
                    _vote(votes_smem, slot_k, keeps, CONSUMER)
                    is_kept = _release_key(k_empty, votes_smem, slot_k, CONSUMER)
                    # as late as can be: V of the block before, if anybody's, needs the others' decisions
                    slot_v = blocks % V_STAGES
                    mbarrier.wait(v_full.index(slot_v), (blocks // V_STAGES) & 1)
                    mbarrier.arrive(v_empty.index(slot_v))
                    blocks += 1
                    word, num_kept = _write_down(bits_row_ptr, word, num_kept, block, is_kept)
                if is_kept:
                    s, l_i, m_i, alpha = _softmax(s, m_before, l_i, m_i, scale_log2)
                    acc = acc * _column(alpha, out_layout)
                    packed = _pack(s, v_smem.dtype)
            mbarrier.wait(v_full.index(blocks % V_STAGES), (blocks // V_STAGES) & 1)
        mbarrier.arrive(q_empty.index(CONSUMER))
        slot = blocks % V_STAGES
        if is_kept:
            acc = warpgroup_mma(_operand(packed, out_layout, v_smem.dtype), _rows(v_smem.index(slot)), acc)
        mbarrier.arrive(v_empty.index(slot))
        blocks += 1

        # read again, not to be held in registers until here
        m0 = gl.load(record_ptr) + CONSUMER * ROWS
        len_q = gl.load(record_ptr + 1)
        _, _, _, end = key_range(
            m0, len_q, gl.load(record_ptr + 2), -1, window_right, ROWS, BLOCK_N, False, HAS_RIGHT
        )  # fmt: skip
        num_visited = gl.where(m0 < len_q, (end + BLOCK_N - 1) // BLOCK_N, 0)
        gl.store(bits_row_ptr, word | 1, mask=num_visited > 0)
        if num_visited > 0:
            seq = gl.load(record_ptr + 12)
            gl.atomic_add(counts_ptr + (seq * heads + head), gl.cast(num_visited, gl.int64), sem="relaxed")
            num_dropped = num_visited - num_kept
            gl.atomic_add(counts_ptr + ((num_seqs + seq) * heads + head), gl.cast(num_dropped, gl.int64), sem="relaxed")
        is_empty = l_i == 0.0
        l_i = gl.where(is_empty, 1.0, l_i)
        out = acc / _column(l_i, out_layout)
        lse = gl.where(is_empty, float("-inf"), m_i * softmax_scale + gl.log(l_i))
        row = gl.load(record_ptr + 8) + CONSUMER * ROWS
        batch_row = gl.load(record_ptr + 7)
        lse_ptrs = lse_ptr + (batch_row * heads + head * rows_q + (row - batch_row))
        offs_m = m0 + gl.arange(0, ROWS, row_layout)
        gl.store(lse_ptrs + gl.arange(0, ROWS, row_layout), lse, mask=offs_m < len_q)
        if HEAD_DIM <= 128:
            end = row - m0 + len_q
            _copy_out(out_desc, end, len_q, m0, head, out, out_smem.index(CONSUMER))
        else:
            index = gl.cast(row * heads + head, gl.int64)
            _store_out(out_ptr, index, out, m0, len_q, heads, out_layout, HEAD_DIM)
        t = _take(tile_smem, tile_full, tiles)
    if HEAD_DIM <= 128:
        tma.store_wait(0)


@gluon.jit(
    do_not_specialize=(
        "rows_q", "heads", "group_size", "heads_at_once", "window_right", "num_seqs",
        "stride_tb", "stride_th", "stride_bh", "stride_bt",
    )
)  # fmt: skip
def hopper_sparse_forward_kernel(
    q_desc, k_desc, v_desc, out_desc, out_ptr, lse_ptr, tiles_ptr, last_tile_ptr,
    threshold_ptr, block_bits_ptr, counts_ptr, rows_q, heads, group_size, heads_at_once, num_seqs,
    softmax_scale, window_right,
    stride_tb, stride_th, stride_bh, stride_bt,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, K_STAGES: gl.constexpr, V_STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
    HAS_RIGHT: gl.constexpr, VISIT_ORDER: gl.constexpr,
):  # fmt: skip
    """Grid (programs,), any number. As hopper_forward_kernel, for two warp groups; block_bits and counts hold 0."""
    gl.static_assert(VISIT_ORDER == 2, "blocks are visited in the order first_then_descending")
    gl.static_assert(V_STAGES > 1, "V of a block is waited for before the slot of the one before it is given back")
    num_tiles = gl.load(last_tile_ptr)
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, 1, ROWS, HEAD_DIM], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [K_STAGES, 1, 1, 1, BLOCK_N, HEAD_DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [V_STAGES, 1, 1, 1, BLOCK_N, HEAD_DIM], v_desc.layout)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], barrier)
    k_empty = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], barrier)
    v_empty = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], barrier)
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(q_full.index(c), count=1)
        mbarrier.init(q_empty.index(c), count=1)
    for slot in gl.static_range(K_STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=CONSUMERS)
    for slot in gl.static_range(V_STAGES):
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(v_empty.index(slot), count=CONSUMERS)
    votes: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    votes_smem = gl.allocate_shared_memory(gl.int32, [K_STAGES * CONSUMERS, 16, 4], votes)
    tile_slots = _allocate_tile_slots()
    out_smem = _allocate_out(q_smem, out_desc, CONSUMERS, HEAD_DIM)
    fence_async_shared()

    shared = (q_smem, k_smem, v_smem, votes_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty)
    work = (tiles_ptr, last_tile_ptr + 1, num_tiles, heads)
    inputs = (q_desc, k_desc, v_desc, group_size, heads_at_once)
    numbers = (softmax_scale, window_right)
    outputs = (out_ptr, lse_ptr, rows_q, out_desc, out_smem)
    skipping = (threshold_ptr, stride_tb, stride_th, block_bits_ptr, stride_bh, stride_bt, counts_ptr, num_seqs)
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    shared,
                    tile_slots,
                    work,
                    numbers,
                    outputs,
                    skipping,
                    0,
                    HEAD_DIM,
                    BLOCK_N,
                    K_STAGES,
                    V_STAGES,
                    HAS_RIGHT,
                ),
            ),
            (
                _consume,
                (
                    shared,
                    tile_slots,
                    work,
                    numbers,
                    outputs,
                    skipping,
                    1,
                    HEAD_DIM,
                    BLOCK_N,
                    K_STAGES,
                    V_STAGES,
                    HAS_RIGHT,
                ),
            ),
            (_produce, (shared, tile_slots, work, inputs, BLOCK_N, K_STAGES, V_STAGES, VISIT_ORDER)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )

"""The forward for sm_90: persistent, one warp that copies and two or three warp groups of 64 rows that compute.

The equations are those of forward.py. Beside each other run the scores of block j, Q K_j^T, and the product of block
j - 1 with its values, P_{j-1} V_{j-1}; the softmax of block j follows while the latter is still running.

A tile t is one of the list and a head. Each program begins with its own, and each further one is the first that nobody
has taken: tiles differ in length. The producer asks the counter in device memory and tells the others through shared
memory, with Q. A tile's key blocks are visited from the last to the first: those masked at their right, those seen
whole, those masked at their left. Of a tile without blocks there is Q alone. So every role counts the same tiles and
the same blocks since the kernel began, and these two counts, `tiles` and `blocks`, decide every slot and every phase:

    slot of block i: i % STAGES; its phase: i // STAGES % 2. Each consumer has Q_STAGES slots of Q, so that the next
    tile's is there when a tile ends, if there is room.

    barrier    arrivals   completes when                                    who waits
    q_full[c]  1 + bytes  the next tile and consumer c's Q are there        consumer c, before its first scores
    q_empty[c] 1          consumer c has its last scores and the next tile  producer, before the Q after it
    k_full[s]  1 + bytes  K of the slot is there                            each consumer, before its scores
    k_empty[s] CONSUMERS  each consumer has the scores of the slot's block  producer, before the K after it
    v_full[s]  1 + bytes  V of the slot is there                            each consumer, before the product
    v_empty[s] CONSUMERS  each consumer's product with the slot's V ended   producer, before the V after it
    turn[c]    1          consumer c - 1 has asked for its products         consumer c of three, before its own

Three consumers take turns, so that the products of one run beside the softmax of the others; two do better without.
A tile's first block takes none; `turns` counts the others.

A barrier's wait for phase p ends once the phase of parity p is over; those of the empty barriers wait for parity
p ^ 1, which at the first use is that of the phase before the first, and so over. No wait is more than one phase behind:
what fills a slot waits until all have left it, and nobody leaves a slot that has not been filled again.
It cannot deadlock: the producer asks for V of block i when consumers have only to end the product of block i - STAGES,
whose K and V, and the K behind it, were all asked for earlier (the product of a tile's last block waits for no K).

Nothing outside a sequence is read. A copy of a block that crosses its sequence's end would bring the next one's rows,
and 0 times their NaN would spoil the product with V; `fa_ops.hopper.ragged_descriptor` makes the copy engine fill them
with zeros. What a sequence's last tile has beyond its rows is computed, and not stored.
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

from fa_ops.kernels import primitives, tiles

LOG2E = gl.constexpr(primitives.LOG2E.value)
RECORD = gl.constexpr(tiles.RECORD.value)
ROWS = gl.constexpr(64)  # of a consumer: what one warp group multiplies at a time
RAGGED_ROWS = gl.constexpr(2**30)
SMALLEST_PART = gl.constexpr(8)  # tiles that are taken for all heads before others; a power of two

# the one masking rule, with Gluon's layouts
is_visible = gluon.jit(primitives.is_visible.fn)


@gluon.jit
def _copy(desc, end, length, row, head, full, smem):
    """Asks for the rows from `row` on of a sequence of `length` rows that ends before `end`."""
    mbarrier.expect(full, desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [RAGGED_ROWS, end, head, RAGGED_ROWS - length + row, 0], full, smem)


@gluon.jit
def _locate(index, num_tiles, heads, heads_at_once):
    """The tile and head that are taken at this place, as a number: tile * heads + head.

    Tiles are taken in parts, each for all heads: those that 2^k to 2^(k + 1) - 1 tiles of the list follow. So the last
    and shortest tiles of a sequence fill up the end. In each part some heads are taken after others: as many at once as
    leave what they read in the L2 cache; of each tile these come one after another.
    """
    total = num_tiles * heads
    behind = (total - 1 - index) // heads
    most = behind | (SMALLEST_PART - 1)
    for k in gl.static_range(5):
        most |= most >> (1 << k)
    least = gl.where(most < SMALLEST_PART, 0, most // 2 + 1)
    first = gl.maximum(num_tiles - 1 - most, 0)
    members = gl.maximum(num_tiles - least - first, 1) * heads_at_once
    member = index - first * heads
    head = member // members * heads_at_once + member % heads_at_once
    return gl.where(index < total, (first + member % members // heads_at_once) * heads + head, index)


@gluon.jit
def _take_number(next_ptr, num_tiles, heads, heads_at_once):
    """The number of the first tile and head that no program has taken."""
    index = gl.num_programs(0) + gl.atomic_add(next_ptr, 1, sem="relaxed")
    return _locate(index, num_tiles, heads, heads_at_once)


@gluon.jit
def _produce(shared, work, inputs, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, turn = shared
    tiles_ptr, num_tiles, heads, first, next_ptr, next_smem = work
    q_desc, k_desc, v_desc, group_size, heads_at_once = inputs
    Q_STAGES: gl.constexpr = q_smem.shape[0] // CONSUMERS
    tiles = 0
    blocks = 0
    t = first
    while t < num_tiles * heads:
        t_next = _take_number(next_ptr, num_tiles, heads, heads_at_once)
        record_ptr = tiles_ptr + t // heads * RECORD
        head = t % heads
        head_kv = head // group_size
        m0 = gl.load(record_ptr)
        len_q = gl.load(record_ptr + 1)
        len_k = gl.load(record_ptr + 2)
        begin = gl.load(record_ptr + 3)
        num_blocks = gl.load(record_ptr + 4) + gl.load(record_ptr + 5) + gl.load(record_ptr + 6)
        end_q = gl.load(record_ptr + 9)
        end_k = gl.load(record_ptr + 10)
        end_v = gl.load(record_ptr + 11)
        slot = tiles % Q_STAGES
        for c in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(slot * CONSUMERS + c), ((tiles // Q_STAGES) & 1) ^ 1)
        next_smem.index(slot).store(gl.full([1], t_next, gl.int32, gl.BlockedLayout([1], [32], [1], [0])))
        for c in gl.static_range(CONSUMERS):
            own = slot * CONSUMERS + c
            _copy(q_desc, end_q, len_q, m0 + c * ROWS, head, q_full.index(own), q_smem.index(own))
        tiles += 1
        for j in range(num_blocks):
            n0 = begin + (num_blocks - 1 - j) * BLOCK_N
            slot = blocks % STAGES
            phase_before = ((blocks // STAGES) & 1) ^ 1
            mbarrier.wait(k_empty.index(slot), phase_before)
            _copy(k_desc, end_k, len_k, n0, head_kv, k_full.index(slot), k_smem.index(slot))
            mbarrier.wait(v_empty.index(slot), phase_before)
            _copy(v_desc, end_v, len_k, n0, head_kv, v_full.index(slot), v_smem.index(slot))
            blocks += 1
        t = t_next


@gluon.jit
def _hide(x):
    """x, of which the compiler knows nothing: what follows from it is not kept in registers from block to block."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _softmax(
    s, l_i, m_i, offs_m, n0, len_q, len_k, window_left, window_right, scale_log2, layout: gl.constexpr,
    BLOCK_N: gl.constexpr, HAS_LEFT: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """(P, l, m, exp(m before - m)) of a block's scores, unscaled; a row that has seen nothing yet has m = -inf."""
    if MASKED:
        offs_n = n0 + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
        visible = is_visible(
            gl.expand_dims(offs_m, 1), gl.expand_dims(offs_n, 0), len_q, len_k, window_left, window_right,
            HAS_LEFT, True,
        )  # fmt: skip
        s = gl.where(visible, s, float("-inf"))
    m_new = gl.maximum(m_i, gl.max(s, 1))
    m_finite = m_new
    if MASKED:
        m_finite = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(s * scale_log2 - gl.expand_dims(m_finite * scale_log2, 1))
    alpha = gl.exp2((m_i - m_finite) * scale_log2)
    return p, l_i * alpha + gl.sum(p, 1), m_new, alpha


@gluon.jit
def _attend(
    acc, l_i, m_i, packed, own, q_smem, zeros, k_smem, v_smem, k_full, k_empty, v_full, v_empty, turn, turns, blocks,
    offs_m, n0, len_q, len_k, window_left, window_right, scale_log2, s_layout: gl.constexpr, out_layout: gl.constexpr,
    CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HAS_LEFT: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """The scores of the key block at n0 beside the product of the block before it, `blocks`, with its values."""
    p = _operand(packed, out_layout, v_smem.dtype)
    slot_k = (blocks + 1) % STAGES
    slot_v = blocks % STAGES
    mbarrier.wait(k_full.index(slot_k), ((blocks + 1) // STAGES) & 1)
    if CONSUMERS == 3:
        mbarrier.wait(turn.index(CONSUMER), (turns & 1) ^ (CONSUMER == 0))
    if q_smem.shape[0] > CONSUMERS:
        own = _hide(own)
    q = _rows(q_smem.index(own))
    scores = warpgroup_mma(q, _rows(k_smem.index(slot_k)).permute((1, 0)), zeros, use_acc=False, is_async=True)
    mbarrier.wait(v_full.index(slot_v), (blocks // STAGES) & 1)
    product = warpgroup_mma(p, _rows(v_smem.index(slot_v)), acc, is_async=True)
    if CONSUMERS == 3:
        mbarrier.arrive(turn.index((CONSUMER + 1) % CONSUMERS))
    if MASKED:
        # few blocks: P's registers are worth more than the overlap
        s, acc, p = warpgroup_mma_wait(0, deps=[scores, product, p])
        mbarrier.arrive(v_empty.index(slot_v))
    else:
        s = warpgroup_mma_wait(1, deps=[scores])
    mbarrier.arrive(k_empty.index(slot_k))
    p_new, l_i, m_i, alpha = _softmax(
        s, l_i, m_i, offs_m, n0, len_q, len_k, window_left, window_right, scale_log2, s_layout,
        BLOCK_N, HAS_LEFT, MASKED,
    )  # fmt: skip
    packed = _pack(p_new, v_smem.dtype)
    if not MASKED:
        # until here the product reads P's registers
        acc, p = warpgroup_mma_wait(0, deps=[product, p])
        mbarrier.arrive(v_empty.index(slot_v))
    acc = acc * _column(alpha, out_layout)
    return acc, l_i, m_i, packed


@gluon.jit
def _allocate_out(none, desc, CONSUMERS: gl.constexpr, HEAD_DIM: gl.constexpr):
    """A tile for each consumer, which `_copy_out` copies from; `none` for head dimensions that have no room for it."""
    smem = none
    if HEAD_DIM <= 128:
        smem = gl.allocate_shared_memory(desc.dtype, [CONSUMERS, 1, 1, 1, ROWS, HEAD_DIM], desc.layout)
    return smem


@gluon.jit
def _copy_out(desc, end, length, row, head, out, smem):
    """Asks for a tile to be written from `row` on, but for rows past the sequence's end; it is read from shared memory
    while the next tile begins."""
    tma.store_wait(0)
    _rows(smem).store(out.to(desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(desc, [RAGGED_ROWS, end, head, RAGGED_ROWS - length + row, 0], smem)


@gluon.jit
def _store_out(ptr, index, out, first, length, heads, layout: gl.constexpr, HEAD_DIM: gl.constexpr):
    """Stores a tile for which there is no room in shared memory, from the head's row `index` of out on, row `first`
    of a sequence of `length` rows."""
    offs_row = gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    offs_d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, layout))
    ptrs = ptr + index * HEAD_DIM
    ptrs = ptrs + gl.expand_dims(offs_row, 1) * (heads * HEAD_DIM) + gl.expand_dims(offs_d, 0)
    gl.store(ptrs, out.to(ptr.dtype.element_ty), mask=gl.expand_dims(first + offs_row < length, 1))


@gluon.jit
def _next_tile(next_smem, q_empty):
    """Which tile comes next, and a word to the producer that the consumer is done with Q and with this."""
    t = gl.sum(next_smem.load(gl.BlockedLayout([1], [32], [4], [0])), 0)
    mbarrier.arrive(q_empty)
    return t


@gluon.jit
def _rows(tile):
    """A shared tile (1, 1, 1, rows, D) as (rows, D)."""
    return tile.reshape((tile.shape[3], tile.shape[4]))


@gluon.jit
def _column(x, layout: gl.constexpr):
    """One number for each row, to multiply a tile in `layout` with."""
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, layout)), 1)


@gluon.jit
def _pack(p, dtype: gl.constexpr):
    """P in 16 bits, two neighbours of a row in an integer: a loop would carry each of them in a register of its own."""
    low, high = gl.split(gl.reshape(p, [p.shape[0], p.shape[1] // 2, 2]))
    convert: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if dtype == gl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(convert, "=r,r,r", [low, high], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _operand(packed, layout: gl.constexpr, dtype: gl.constexpr):
    """What _pack gave, as the left operand of a product that accumulates in `layout`. No instruction comes of it."""
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [packed], dtype=(gl.int16, gl.int16), is_pure=True, pack=1
    )
    p = gl.reshape(gl.join(low, high), [packed.shape[0], 2 * packed.shape[1]])
    return gl.convert_layout(gl.cast(p, dtype, bitcast=True), gl.DotOperandLayout(0, layout, 2))


@gluon.jit
def _consume(
    shared, work, numbers, outputs, CONSUMER: gl.constexpr, CONSUMERS: gl.constexpr,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HAS_LEFT: gl.constexpr,
):  # fmt: skip
    q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, turn = shared
    tiles_ptr, num_tiles, heads, first, next_ptr, next_smem = work
    softmax_scale, window_left, window_right = numbers
    out_ptr, lse_ptr, rows_q, out_desc, out_smem = outputs
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, s_layout)
    Q_STAGES: gl.constexpr = q_smem.shape[0] // CONSUMERS
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    scale_log2 = softmax_scale * LOG2E
    tiles = 0
    blocks = 0
    turns = 0
    t = first
    while t < num_tiles * heads:
        record_ptr = tiles_ptr + t // heads * RECORD
        head = t % heads
        m0 = gl.load(record_ptr) + CONSUMER * ROWS
        len_q = gl.load(record_ptr + 1)
        len_k = gl.load(record_ptr + 2)
        begin = gl.load(record_ptr + 3)
        num_blocks = gl.load(record_ptr + 4) + gl.load(record_ptr + 5) + gl.load(record_ptr + 6)
        offs_m = m0 + gl.arange(0, ROWS, row_layout)
        acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, out_layout)
        l_i = gl.zeros([ROWS], gl.float32, row_layout)
        m_i = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
        q_slot = tiles % Q_STAGES
        own = q_slot * CONSUMERS + CONSUMER
        mbarrier.wait(q_full.index(own), (tiles // Q_STAGES) & 1)
        tiles += 1
        if num_blocks > 0:
            last = begin + (num_blocks - 1) * BLOCK_N
            slot = blocks % STAGES
            mbarrier.wait(k_full.index(slot), (blocks // STAGES) & 1)
            s = warpgroup_mma(_rows(q_smem.index(own)), _rows(k_smem.index(slot)).permute((1, 0)), zeros, use_acc=False)
            mbarrier.arrive(k_empty.index(slot))
            p, l_i, m_i, alpha = _softmax(
                s, l_i, m_i, offs_m, last, len_q, len_k, window_left, window_right, scale_log2, s_layout,
                BLOCK_N, HAS_LEFT, True,
            )  # fmt: skip
            packed = _pack(p, v_smem.dtype)
            # one block is behind us; those masked at their left share the loop of those masked at their right
            n0 = last - BLOCK_N
            num_whole = gl.load(record_ptr + 5)
            num_masked = gl.load(record_ptr + 6) - 1
            if num_masked < 0:
                num_whole = gl.maximum(num_whole - 1, 0)
                num_masked = 0
            for side in range(1 + HAS_LEFT):
                if side == 1:
                    num_masked = num_blocks - 1 - num_masked - num_whole
                    num_whole = 0
                for _ in range(num_masked):
                    acc, l_i, m_i, packed = _attend(
                        acc, l_i, m_i, packed, own, q_smem, zeros, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
                        turn, turns, blocks, offs_m, n0, len_q, len_k, window_left, window_right, scale_log2, s_layout,
                        out_layout, CONSUMER, CONSUMERS, BLOCK_N, STAGES, HAS_LEFT, True,
                    )  # fmt: skip
                    n0 -= BLOCK_N
                    blocks += 1
                    turns += 1
                for _ in range(num_whole):
                    acc, l_i, m_i, packed = _attend(
                        acc, l_i, m_i, packed, own, q_smem, zeros, k_smem, v_smem, k_full, k_empty, v_full, v_empty,
                        turn, turns, blocks, offs_m, n0, len_q, len_k, window_left, window_right, scale_log2, s_layout,
                        out_layout, CONSUMER, CONSUMERS, BLOCK_N, STAGES, HAS_LEFT, False,
                    )  # fmt: skip
                    n0 -= BLOCK_N
                    blocks += 1
                    turns += 1
            t = _next_tile(next_smem.index(q_slot), q_empty.index(own))
            slot = blocks % STAGES
            mbarrier.wait(v_full.index(slot), (blocks // STAGES) & 1)
            acc = warpgroup_mma(_operand(packed, out_layout, v_smem.dtype), _rows(v_smem.index(slot)), acc)
            mbarrier.arrive(v_empty.index(slot))
            blocks += 1
        else:
            t = _next_tile(next_smem.index(q_slot), q_empty.index(own))
        is_empty = l_i == 0.0
        l_i = gl.where(is_empty, 1.0, l_i)
        out = acc / _column(l_i, out_layout)
        lse = gl.where(is_empty, float("-inf"), m_i * softmax_scale + gl.log(l_i))
        batch_row = gl.cast(gl.load(record_ptr + 7), gl.int64)
        row = gl.cast(gl.load(record_ptr + 8) + CONSUMER * ROWS, gl.int64)
        lse_ptrs = lse_ptr + batch_row * (heads - 1) + gl.cast(head, gl.int64) * rows_q + row
        gl.store(lse_ptrs + gl.arange(0, ROWS, row_layout), lse, mask=offs_m < len_q)
        if HEAD_DIM <= 128:
            m0 = gl.load(record_ptr)
            end = gl.load(record_ptr + 8) - m0 + len_q
            _copy_out(out_desc, end, len_q, m0 + CONSUMER * ROWS, head, out, out_smem.index(CONSUMER))
        else:
            _store_out(out_ptr, row * heads + head, out, m0, len_q, heads, out_layout, HEAD_DIM)
    if HEAD_DIM <= 128:
        tma.store_wait(0)


@gluon.jit(
    do_not_specialize=(
        "tile_bound", "rows_q", "heads", "group_size", "heads_at_once", "window_left", "window_right",
    )
)  # fmt: skip
def hopper_forward_kernel(
    q_desc, k_desc, v_desc, out_desc, out_ptr, lse_ptr, tiles_ptr, tile_bound, rows_q, heads, group_size,
    heads_at_once, softmax_scale, window_left, window_right,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
    HAS_LEFT: gl.constexpr,
):  # fmt: skip
    """Grid (programs,), any number. The descriptors are ragged, for tiles (1, 1, 1, 64 or BLOCK_N, HEAD_DIM); out and
    lse are contiguous; rows of no sequence are `tile_list_kernel`'s. There always is a window at the right, if need be
    so wide that it hides nothing."""
    num_tiles = gl.load(tiles_ptr + tile_bound * RECORD)
    # tiles whose Q is there at once: the next one's too, where there is room
    Q_STAGES: gl.constexpr = 2 if HEAD_DIM <= 128 else 1
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [Q_STAGES * CONSUMERS, 1, 1, 1, ROWS, HEAD_DIM], q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, 1, BLOCK_N, HEAD_DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, 1, BLOCK_N, HEAD_DIM], v_desc.layout)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES * CONSUMERS, 1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES * CONSUMERS, 1], barrier)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    next_smem = gl.allocate_shared_memory(gl.int32, [Q_STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    turn = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], barrier)
    out_smem = _allocate_out(q_smem, out_desc, CONSUMERS, HEAD_DIM)
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(turn.index(c), count=1)
    for own in gl.static_range(Q_STAGES * CONSUMERS):
        mbarrier.init(q_full.index(own), count=1)
        mbarrier.init(q_empty.index(own), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
        mbarrier.init(k_empty.index(slot), count=CONSUMERS)
        mbarrier.init(v_empty.index(slot), count=CONSUMERS)
    fence_async_shared()

    shared = (q_smem, k_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, turn)
    first = _locate(gl.program_id(0), num_tiles, heads, heads_at_once)
    work = (tiles_ptr, num_tiles, heads, first, tiles_ptr + tile_bound * RECORD + 1, next_smem)
    inputs = (q_desc, k_desc, v_desc, group_size, heads_at_once)
    numbers = (softmax_scale, window_left, window_right)
    outputs = (out_ptr, lse_ptr, rows_q, out_desc, out_smem)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (shared, work, numbers, outputs, 0, CONSUMERS, HEAD_DIM, BLOCK_N, STAGES, HAS_LEFT)),
                (_consume, (shared, work, numbers, outputs, 1, CONSUMERS, HEAD_DIM, BLOCK_N, STAGES, HAS_LEFT)),
                (_produce, (shared, work, inputs, BLOCK_N, STAGES, CONSUMERS)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (shared, work, numbers, outputs, 0, CONSUMERS, HEAD_DIM, BLOCK_N, STAGES, HAS_LEFT)),
                (_consume, (shared, work, numbers, outputs, 1, CONSUMERS, HEAD_DIM, BLOCK_N, STAGES, HAS_LEFT)),
                (_consume, (shared, work, numbers, outputs, 2, CONSUMERS, HEAD_DIM, BLOCK_N, STAGES, HAS_LEFT)),
                (_produce, (shared, work, inputs, BLOCK_N, STAGES, CONSUMERS)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )

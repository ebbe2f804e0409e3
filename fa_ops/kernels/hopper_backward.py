"""The backward for sm_90, deterministic: a kernel for dQ, and one for dK and dV. P is recomputed in both.

The equations are those of backward.py. Each kernel is persistent, one warp that copies and two or three warp groups
that compute, as in hopper.py. A warp group has 64 rows of its own and their gradient in registers: queries in the one
kernel, keys in the other, where the scores are transposed, S^T = K Q^T. So P and dS are left operands as they come out
of the products, and nothing of them passes through shared memory.

Programs take tiles by a counter, since which of them has a tile changes no result: the producer does, and tells the
warp groups through `tile_smem`. Number t is (tile t // heads of the list, head t % heads). A tile's blocks are those of
the other side that it sees, for each query head of the group where the tile is one of keys; tiles without blocks are
not told of. So every role counts the same tiles and the same blocks since the kernel began, and these two counts,
`tiles` and `blocks`, decide every slot and every phase:

    slot of block i: i % STAGES; its phase: i // STAGES % 2. For rows each consumer has one slot for dQ, of phase
    tiles % 2, and OWN_STAGES for dK and dV, so that the next tile's are there when a tile ends.

    barrier      arrivals   completes when                                       who waits
    own_full[c]  2 + bytes  the rows of consumer c are in shared memory: Q, dO   consumer c, before its first block
                            or K, V
    own_empty[c] 1          consumer c's first products with Q and dO ended, or  producer, before the rows of the tile
                            the last ones with K and V                           that has the slot next
    full[s]      n + bytes  the slot's block is there: K, V or Q, dO, lse, delta each consumer, before its products
    empty[s]     CONSUMERS  the products of each consumer with the block ended   producer, before the block after it
    tile_full[s] 1          the number of tile i is there, s = i % 2             each consumer, before its tile

For dQ, the scores and dP of a block run beside the product of dS of the block before it with its keys, which is why
there are at least two slots; P and dS follow while that product is still running. For dK and dV, P follows beside dP,
and dS beside P^T dO: registers do not allow for more.

Every wait for a phase is for the one that is running or for the one before it, as in hopper.py; and the producer asks
for a block when consumers have only to end the block STAGES before it, all of which was asked for earlier. The number
of a tile takes the place of that of the last tile but one, which the producer knows that consumers have begun, for dQ,
or ended, for dK and dV.

Gradients are written to shared memory, from where the copy engine takes them while the next tile begins; dK and dV one
after the other through the same place.

Nothing outside a sequence takes part. Blocks that cross its end are filled up with zeros by the copy engine. Rows that
see no key are left out by the list of tiles, since their dO may be NaN. lse and delta come from `row_terms_kernel`,
which fills them up to whole blocks: an lse of +inf makes P 0.
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

from fa_ops.kernels import backward_tiles
from fa_ops.kernels.hopper import (
    LOG2E,
    ROWS,
    _copy,
    _copy_out,
    _hide,
    _locate,
    _operand,
    _pack,
    _rows,
    _take_number,
    is_visible,
)
from fa_ops.kernels.hopper_sparse import _allocate_tile_slots, _give, _take

RECORD = gl.constexpr(backward_tiles.RECORD.value)
OWN_STAGES = gl.constexpr(2)  # tiles whose K and V are there at once


@gluon.jit
def _copy_terms(desc, row, head, slot, full, smem):
    """Asks for lse and delta of a block of rows."""
    for term in gl.static_range(2):
        mbarrier.expect(full, desc.block_type.nbytes)
        tma.async_copy_global_to_shared(desc, [2 * head + term, row], full, smem.index(2 * slot + term))


@gluon.jit
def _allocate_offs(BLOCK: gl.constexpr):
    """The numbers from 0 in shared memory: what a mask adds to them would be kept in registers all along otherwise."""
    smem = gl.allocate_shared_memory(gl.int32, [BLOCK], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    smem.store(gl.arange(0, BLOCK, gl.BlockedLayout([1], [32], [4], [0])))
    return smem


@gluon.jit
def _produce_keys(
    shared, tile_slots, work, descs, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr
):  # fmt: skip
    """Copies for dQ: Q and dO of a tile, and K and V of its blocks."""
    q_smem, dout_smem, k_smem, v_smem, dq_smem, offs_smem, own_full, own_empty, full, empty = shared
    tile_smem, tile_full = tile_slots
    tiles_ptr, next_ptr, num_tiles, heads, group_size, heads_at_once = work
    q_desc, dout_desc, k_desc, v_desc = descs
    tiles = 0
    blocks = 0
    t = _locate(gl.program_id(0), num_tiles, heads, heads_at_once)
    while t < num_tiles * heads:
        record_ptr = tiles_ptr + t // heads * RECORD
        head = t % heads
        m0 = gl.load(record_ptr)
        len_q = gl.load(record_ptr + 1)
        len_k = gl.load(record_ptr + 2)
        n0 = gl.load(record_ptr + 3)
        num_blocks = gl.load(record_ptr + 4) + gl.load(record_ptr + 5) + gl.load(record_ptr + 6)
        end_q = gl.load(record_ptr + 9)
        end_dout = gl.load(record_ptr + 10)
        end_k = gl.load(record_ptr + 11)
        end_v = gl.load(record_ptr + 12)
        if num_blocks > 0:
            _give(t, tile_smem, tile_full, tiles)
            for c in gl.static_range(CONSUMERS):
                mbarrier.wait(own_empty.index(c), (tiles & 1) ^ 1)
                _copy(q_desc, end_q, len_q, m0 + c * ROWS, head, own_full.index(c), q_smem.index(c))
                _copy(dout_desc, end_dout, len_q, m0 + c * ROWS, head, own_full.index(c), dout_smem.index(c))
            tiles += 1
            for _ in range(num_blocks):
                slot = blocks % STAGES
                mbarrier.wait(empty.index(slot), ((blocks // STAGES) & 1) ^ 1)
                _copy(k_desc, end_k, len_k, n0, head // group_size, full.index(slot), k_smem.index(slot))
                _copy(v_desc, end_v, len_k, n0, head // group_size, full.index(slot), v_smem.index(slot))
                n0 += BLOCK_N
                blocks += 1
        # the warp groups still have blocks to go when this is asked for
        t = _take_number(next_ptr, num_tiles, heads, heads_at_once)
    _give(t, tile_smem, tile_full, tiles)


@gluon.jit
def _score_gradients(
    s, dp, lse, delta, offs_smem, offs_m, n0, len_q, len_k, window_right, scale_log2,
    s_layout: gl.constexpr, HAS_RIGHT: gl.constexpr, MASKED: gl.constexpr, NUM_BEHIND: gl.constexpr,
):  # fmt: skip
    """dS of the key block at n0 from its scores S and the product dP, behind which NUM_BEHIND others are running."""
    s = warpgroup_mma_wait(NUM_BEHIND + 1, deps=[s])
    if MASKED:
        offs_n = n0 + offs_smem.load(gl.SliceLayout(0, s_layout))
        visible = is_visible(
            gl.expand_dims(offs_m, 1), gl.expand_dims(offs_n, 0), len_q, len_k, -1, window_right, False, HAS_RIGHT
        )
        s = gl.where(visible, s, float("-inf"))
    p = gl.exp2(s * scale_log2 - gl.expand_dims(lse, 1))
    dp = warpgroup_mma_wait(NUM_BEHIND, deps=[dp])
    return p * (dp - gl.expand_dims(delta, 1))


@gluon.jit
def _add_keys(
    dq, packed, q, dout, zeros, lse, delta, k_smem, v_smem, offs_smem, full, empty, blocks, offs_m, n0, len_q, len_k,
    window_right, scale_log2, s_layout: gl.constexpr, out_layout: gl.constexpr, STAGES: gl.constexpr,
    HAS_RIGHT: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """(dq + dS K of the block before, dS packed) of the key block at n0, `blocks`."""
    ds = _operand(packed, out_layout, k_smem.dtype)
    slot = blocks % STAGES
    slot_before = (blocks + STAGES - 1) % STAGES
    mbarrier.wait(full.index(slot), (blocks // STAGES) & 1)
    scores = warpgroup_mma(q, _rows(k_smem.index(slot)).permute((1, 0)), zeros, use_acc=False, is_async=True)
    products = warpgroup_mma(dout, _rows(v_smem.index(slot)).permute((1, 0)), zeros, use_acc=False, is_async=True)
    product = warpgroup_mma(ds, _rows(k_smem.index(slot_before)), dq, is_async=True)
    gradients = _score_gradients(
        scores, products, lse, delta, offs_smem, offs_m, n0, len_q, len_k, window_right, scale_log2,
        s_layout, HAS_RIGHT, MASKED, 1,
    )  # fmt: skip
    packed = _pack(gradients, k_smem.dtype)
    dq, ds = warpgroup_mma_wait(0, deps=[product, ds])
    mbarrier.arrive(empty.index(slot_before))
    return dq, packed


@gluon.jit
def _consume_keys(
    shared, tile_slots, work, numbers, inputs, dq_desc, CONSUMER: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    q_smem, dout_smem, k_smem, v_smem, dq_smem, offs_smem, own_full, own_empty, full, empty = shared
    tile_smem, tile_full = tile_slots
    tiles_ptr, next_ptr, num_tiles, heads, group_size, heads_at_once = work
    softmax_scale, window_right = numbers
    terms_ptr, terms_rows = inputs
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, s_layout, 2)
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
        n0 = gl.load(record_ptr + 3)
        num_full = gl.load(record_ptr + 5)
        num_right = gl.load(record_ptr + 6)
        offs_m = m0 + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
        first = gl.load(record_ptr + 8)
        terms_ptrs = terms_ptr + gl.cast(head, gl.int64) * 2 * terms_rows + first + offs_m
        lse = gl.load(terms_ptrs, mask=offs_m < len_q, other=float("inf"))
        delta = gl.load(terms_ptrs + terms_rows, mask=offs_m < len_q, other=0.0)
        dq = gl.zeros([ROWS, HEAD_DIM], gl.float32, out_layout)
        mbarrier.wait(own_full.index(CONSUMER), tiles & 1)
        tiles += 1
        q = _rows(q_smem.index(CONSUMER)).load(operand)
        dout = _rows(dout_smem.index(CONSUMER)).load(operand)
        slot = blocks % STAGES
        mbarrier.wait(full.index(slot), (blocks // STAGES) & 1)
        scores = warpgroup_mma(q, _rows(k_smem.index(slot)).permute((1, 0)), zeros, use_acc=False, is_async=True)
        products = warpgroup_mma(dout, _rows(v_smem.index(slot)).permute((1, 0)), zeros, use_acc=False, is_async=True)
        ds = _score_gradients(
            scores, products, lse, delta, offs_smem, offs_m, n0, len_q, len_k, window_right, scale_log2,
            s_layout, HAS_RIGHT, True, 0,
        )  # fmt: skip
        # Q and dO are operands in registers, so their place is free for those of the next tile. Not before a product
        # with them has ended: until then loads may be under way, and the copy engine would overtake them.
        mbarrier.arrive(own_empty.index(CONSUMER))
        packed = _pack(ds, k_smem.dtype)
        n0 += BLOCK_N
        blocks += 1
        if num_full == 0:
            num_right -= 1
        for _ in range(num_full - 1):
            dq, packed = _add_keys(
                dq, packed, q, dout, zeros, lse, delta, k_smem, v_smem, offs_smem, full, empty, blocks, offs_m, n0,
                len_q, len_k, window_right, scale_log2, s_layout, out_layout, STAGES, HAS_RIGHT, False,
            )  # fmt: skip
            n0 += BLOCK_N
            blocks += 1
        for _ in range(num_right):
            dq, packed = _add_keys(
                dq, packed, q, dout, zeros, lse, delta, k_smem, v_smem, offs_smem, full, empty, blocks, offs_m, n0,
                len_q, len_k, window_right, scale_log2, s_layout, out_layout, STAGES, HAS_RIGHT, True,
            )  # fmt: skip
            n0 += BLOCK_N
            blocks += 1
        slot = (blocks + STAGES - 1) % STAGES
        dq = warpgroup_mma(_operand(packed, out_layout, k_smem.dtype), _rows(k_smem.index(slot)), dq)
        mbarrier.arrive(empty.index(slot))
        # read again rather than kept in registers
        m0 = gl.load(record_ptr)
        len_q = gl.load(record_ptr + 1)
        end = gl.load(record_ptr + 7) - m0 + len_q
        _copy_out(dq_desc, end, len_q, m0 + CONSUMER * ROWS, t % heads, dq * softmax_scale, dq_smem.index(CONSUMER))
        t = _take(tile_smem, tile_full, tiles)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=("tile_bound", "heads", "group_size", "heads_at_once", "window_right", "terms_rows"))
def hopper_dq_kernel(
    q_desc, dout_desc, k_desc, v_desc, dq_desc, terms_ptr, terms_rows, tiles_ptr, tile_bound, heads, group_size,
    heads_at_once, softmax_scale, window_right,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """Grid (programs,), any number. The descriptors are ragged, for tiles of 64 rows (q, dout, dq) or BLOCK_N (k, v);
    terms (Hq, 2, terms_rows) float32 is what `row_terms_kernel` writes. dq is contiguous; rows of tiles without blocks
    are not written."""
    num_tiles = gl.load(tiles_ptr + tile_bound * RECORD)
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, 1, ROWS, HEAD_DIM], q_desc.layout)
    dout_smem = gl.allocate_shared_memory(q_desc.dtype, [CONSUMERS, 1, 1, 1, ROWS, HEAD_DIM], dout_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, 1, 1, BLOCK_N, HEAD_DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES, 1, 1, 1, BLOCK_N, HEAD_DIM], v_desc.layout)
    dq_smem = gl.allocate_shared_memory(dq_desc.dtype, [CONSUMERS, 1, 1, 1, ROWS, HEAD_DIM], dq_desc.layout)
    offs_smem = _allocate_offs(BLOCK_N)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    own_full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], barrier)
    own_empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], barrier)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    for c in gl.static_range(CONSUMERS):
        mbarrier.init(own_full.index(c), count=2)
        mbarrier.init(own_empty.index(c), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=2)
        mbarrier.init(empty.index(slot), count=CONSUMERS)
    tile_slots = _allocate_tile_slots()
    fence_async_shared()

    shared = (q_smem, dout_smem, k_smem, v_smem, dq_smem, offs_smem, own_full, own_empty, full, empty)
    work = (tiles_ptr, tiles_ptr + tile_bound * RECORD + 1, num_tiles, heads, group_size, heads_at_once)
    descs = (q_desc, dout_desc, k_desc, v_desc)
    numbers = (softmax_scale, window_right)
    inputs = (terms_ptr, terms_rows)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (
                    _consume_keys,
                    (shared, tile_slots, work, numbers, inputs, dq_desc, 0, HEAD_DIM, BLOCK_N, STAGES, HAS_RIGHT),
                ),
                (
                    _consume_keys,
                    (shared, tile_slots, work, numbers, inputs, dq_desc, 1, HEAD_DIM, BLOCK_N, STAGES, HAS_RIGHT),
                ),
                (_produce_keys, (shared, tile_slots, work, descs, BLOCK_N, STAGES, CONSUMERS)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (
                    _consume_keys,
                    (shared, tile_slots, work, numbers, inputs, dq_desc, 0, HEAD_DIM, BLOCK_N, STAGES, HAS_RIGHT),
                ),
                (
                    _consume_keys,
                    (shared, tile_slots, work, numbers, inputs, dq_desc, 1, HEAD_DIM, BLOCK_N, STAGES, HAS_RIGHT),
                ),
                (
                    _consume_keys,
                    (shared, tile_slots, work, numbers, inputs, dq_desc, 2, HEAD_DIM, BLOCK_N, STAGES, HAS_RIGHT),
                ),
                (_produce_keys, (shared, tile_slots, work, descs, BLOCK_N, STAGES, CONSUMERS)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )


@gluon.jit
def _wait_for_place(own_empty, tiles, CONSUMERS: gl.constexpr):
    """The first consumer's place for K and V of tile number `tiles`, as soon as all have left the tile that had it."""
    own = tiles % OWN_STAGES * CONSUMERS
    for c in gl.static_range(CONSUMERS):
        mbarrier.wait(own_empty.index(own + c), ((tiles // OWN_STAGES) & 1) ^ 1)
    return own


@gluon.jit
def _produce_queries(
    shared, tile_slots, work, descs, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr
):  # fmt: skip
    """Copies for dK and dV: K and V of a tile, and Q, dO, lse and delta of its blocks."""
    k_smem, v_smem, q_smem, dout_smem, terms_smem, out_smem, offs_smem, own_full, own_empty, full, empty = shared
    tile_smem, tile_full = tile_slots
    tiles_ptr, next_ptr, num_tiles, heads, group_size, heads_at_once = work
    q_desc, dout_desc, k_desc, v_desc, terms_desc = descs
    tiles = 0
    blocks = 0
    t = _locate(gl.program_id(0), num_tiles, heads, heads_at_once)
    while t < num_tiles * heads:
        record_ptr = tiles_ptr + t // heads * RECORD
        head_kv = t % heads
        n0 = gl.load(record_ptr)
        len_q = gl.load(record_ptr + 1)
        len_k = gl.load(record_ptr + 2)
        begin = gl.load(record_ptr + 3)
        num_blocks = gl.load(record_ptr + 4) + gl.load(record_ptr + 5) + gl.load(record_ptr + 6)
        first = gl.load(record_ptr + 8)
        end_q = gl.load(record_ptr + 9)
        end_dout = gl.load(record_ptr + 10)
        end_k = gl.load(record_ptr + 11)
        end_v = gl.load(record_ptr + 12)
        if num_blocks > 0:
            own = _wait_for_place(own_empty, tiles, CONSUMERS)
            _give(t, tile_smem, tile_full, tiles)
            for c in gl.static_range(CONSUMERS):
                _copy(k_desc, end_k, len_k, n0 + c * ROWS, head_kv, own_full.index(own + c), k_smem.index(own + c))
                _copy(v_desc, end_v, len_k, n0 + c * ROWS, head_kv, own_full.index(own + c), v_smem.index(own + c))
            tiles += 1
            for head in range(head_kv * group_size, (head_kv + 1) * group_size):
                m0 = begin
                for _ in range(num_blocks):
                    slot = blocks % STAGES
                    mbarrier.wait(empty.index(slot), ((blocks // STAGES) & 1) ^ 1)
                    _copy(q_desc, end_q, len_q, m0, head, full.index(slot), q_smem.index(slot))
                    _copy(dout_desc, end_dout, len_q, m0, head, full.index(slot), dout_smem.index(slot))
                    _copy_terms(terms_desc, first + m0, head, slot, full.index(slot), terms_smem)
                    m0 += BLOCK_M
                    blocks += 1
        # the warp groups still have blocks to go when this is asked for
        t = _take_number(next_ptr, num_tiles, heads, heads_at_once)
    _wait_for_place(own_empty, tiles, CONSUMERS)
    _give(t, tile_smem, tile_full, tiles)


@gluon.jit
def _add_queries(
    dk, dv, own, k_smem, v_smem, zeros, q_smem, dout_smem, terms_smem, offs_smem, full, empty, blocks, first_rows, m0,
    scale_log2, s_layout: gl.constexpr, out_layout: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """(dk + dS^T Q, dv + P^T dO) over the query rows [m0, m0 + BLOCK_M), of block `blocks`."""
    slot = blocks % STAGES
    mbarrier.wait(full.index(slot), (blocks // STAGES) & 1)
    place = _hide(own)
    k = _rows(k_smem.index(place))
    v = _rows(v_smem.index(place))
    q = _rows(q_smem.index(slot))
    dout = _rows(dout_smem.index(slot))
    scores = warpgroup_mma(k, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
    products = warpgroup_mma(v, dout.permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=[scores])
    if MASKED:
        offs_m = m0 + offs_smem.load(gl.SliceLayout(0, s_layout))
        s = gl.where(gl.expand_dims(offs_m, 0) >= gl.expand_dims(first_rows, 1), s, float("-inf"))
    p = gl.exp2(s * scale_log2 - _load_term(terms_smem.index(2 * slot), s_layout))
    p_operand = _operand(_pack(p, dout_smem.dtype), out_layout, dout_smem.dtype)
    product_v = warpgroup_mma(p_operand, dout, dv, is_async=True)
    dp = warpgroup_mma_wait(1, deps=[products])
    ds = p * (dp - _load_term(terms_smem.index(2 * slot + 1), s_layout))
    ds = _operand(_pack(ds, q_smem.dtype), out_layout, q_smem.dtype)
    product_k = warpgroup_mma(ds, q, dk, is_async=True)
    dv, dk, p_operand, ds = warpgroup_mma_wait(0, deps=[product_v, product_k, p_operand, ds])
    mbarrier.arrive(empty.index(slot))
    return dk, dv


@gluon.jit
def _load_term(smem, layout: gl.constexpr):
    """lse or delta of a block of query rows, as a row to broadcast over transposed scores in `layout`."""
    return gl.expand_dims(smem.reshape((smem.shape[1],)).load(gl.SliceLayout(0, layout)), 0)


@gluon.jit
def _consume_queries(
    shared, tile_slots, work, numbers, outputs, CONSUMER: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr, HAS_RIGHT: gl.constexpr, CONSUMERS: gl.constexpr,
):  # fmt: skip
    k_smem, v_smem, q_smem, dout_smem, terms_smem, out_smem, offs_smem, own_full, own_empty, full, empty = shared
    tile_smem, tile_full = tile_slots
    tiles_ptr, next_ptr, num_tiles, heads, group_size, heads_at_once = work
    softmax_scale, window_right = numbers
    dk_desc, dv_desc = outputs
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, s_layout)
    scale_log2 = softmax_scale * LOG2E
    tiles = 0
    blocks = 0
    t = _take(tile_smem, tile_full, tiles)
    while t < num_tiles * heads:
        record_ptr = tiles_ptr + t // heads * RECORD
        # the first query row that sees a key; neither keys nor rows behind the sequence's end need a mask: nothing is
        # stored of those, and the lse of these is +inf
        first_row = gl.load(record_ptr) + CONSUMER * ROWS
        if HAS_RIGHT:
            first_row += gl.load(record_ptr + 1) - gl.load(record_ptr + 2) - window_right
        first_rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
        begin = gl.load(record_ptr + 3)
        num_left = gl.load(record_ptr + 4)
        num_whole = gl.load(record_ptr + 5) + gl.load(record_ptr + 6)
        dk = gl.zeros([ROWS, HEAD_DIM], gl.float32, out_layout)
        dv = gl.zeros([ROWS, HEAD_DIM], gl.float32, out_layout)
        own = tiles % OWN_STAGES * CONSUMERS + CONSUMER
        mbarrier.wait(own_full.index(own), (tiles // OWN_STAGES) & 1)
        tiles += 1
        for _member in range(group_size):
            m0 = begin
            if HAS_RIGHT:
                for _ in range(num_left):
                    dk, dv = _add_queries(
                        dk, dv, own, k_smem, v_smem, zeros, q_smem, dout_smem, terms_smem, offs_smem, full, empty,
                        blocks, first_rows, m0, scale_log2, s_layout, out_layout, BLOCK_M, STAGES, True,
                    )  # fmt: skip
                    m0 += BLOCK_M
                    blocks += 1
            for _ in range(num_whole):
                dk, dv = _add_queries(
                    dk, dv, own, k_smem, v_smem, zeros, q_smem, dout_smem, terms_smem, offs_smem, full, empty, blocks,
                    first_rows, m0, scale_log2, s_layout, out_layout, BLOCK_M, STAGES, False,
                )  # fmt: skip
                m0 += BLOCK_M
                blocks += 1
        mbarrier.arrive(own_empty.index(own))
        # read again rather than kept in registers
        n0 = gl.load(record_ptr)
        len_k = gl.load(record_ptr + 2)
        end = gl.load(record_ptr + 7) - n0 + len_k
        n0 += CONSUMER * ROWS
        _copy_out(dk_desc, end, len_k, n0, t % heads, dk * softmax_scale, out_smem.index(CONSUMER))
        _copy_out(dv_desc, end, len_k, n0, t % heads, dv, out_smem.index(CONSUMER))
        t = _take(tile_smem, tile_full, tiles)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=("tile_bound", "heads", "group_size", "heads_at_once", "window_right"))
def hopper_dkv_kernel(
    q_desc, dout_desc, k_desc, v_desc, terms_desc, dk_desc, dv_desc, tiles_ptr, tile_bound, heads, group_size,
    heads_at_once, softmax_scale, window_right,
    HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
):  # fmt: skip
    """Grid (programs,), any number. The descriptors are ragged, for tiles of BLOCK_M rows (q, dout) or 64 (k, v, dk,
    dv); terms_desc reads BLOCK_M numbers of a row of (2 Hq, terms_rows), where `row_terms_kernel` writes lse and delta.
    `heads` are those of the keys. dk and dv are contiguous; tiles without blocks are not written."""
    num_tiles = gl.load(tiles_ptr + tile_bound * RECORD)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [OWN_STAGES * CONSUMERS, 1, 1, 1, ROWS, HEAD_DIM], k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [OWN_STAGES * CONSUMERS, 1, 1, 1, ROWS, HEAD_DIM], v_desc.layout)
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES, 1, 1, 1, BLOCK_M, HEAD_DIM], q_desc.layout)
    dout_smem = gl.allocate_shared_memory(dout_desc.dtype, [STAGES, 1, 1, 1, BLOCK_M, HEAD_DIM], dout_desc.layout)
    terms_smem = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, BLOCK_M], terms_desc.layout)
    out_smem = gl.allocate_shared_memory(dk_desc.dtype, [CONSUMERS, 1, 1, 1, ROWS, HEAD_DIM], dk_desc.layout)
    offs_smem = _allocate_offs(BLOCK_M)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    own_full = gl.allocate_shared_memory(gl.int64, [OWN_STAGES * CONSUMERS, 1], barrier)
    own_empty = gl.allocate_shared_memory(gl.int64, [OWN_STAGES * CONSUMERS, 1], barrier)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    for c in gl.static_range(OWN_STAGES * CONSUMERS):
        mbarrier.init(own_full.index(c), count=2)
        mbarrier.init(own_empty.index(c), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(full.index(slot), count=4)
        mbarrier.init(empty.index(slot), count=CONSUMERS)
    tile_slots = _allocate_tile_slots()
    fence_async_shared()

    shared = (k_smem, v_smem, q_smem, dout_smem, terms_smem, out_smem, offs_smem, own_full, own_empty, full, empty)
    work = (tiles_ptr, tiles_ptr + tile_bound * RECORD + 1, num_tiles, heads, group_size, heads_at_once)
    descs = (q_desc, dout_desc, k_desc, v_desc, terms_desc)
    numbers = (softmax_scale, window_right)
    outputs = (dk_desc, dv_desc)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (
                    _consume_queries,
                    (shared, tile_slots, work, numbers, outputs, 0, HEAD_DIM, BLOCK_M, STAGES, HAS_RIGHT, CONSUMERS),
                ),
                (
                    _consume_queries,
                    (shared, tile_slots, work, numbers, outputs, 1, HEAD_DIM, BLOCK_M, STAGES, HAS_RIGHT, CONSUMERS),
                ),
                (_produce_queries, (shared, tile_slots, work, descs, BLOCK_M, STAGES, CONSUMERS)),
            ],
            [4, 1],
            [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )
    else:
        gl.warp_specialize(
            [
                (
                    _consume_queries,
                    (shared, tile_slots, work, numbers, outputs, 0, HEAD_DIM, BLOCK_M, STAGES, HAS_RIGHT, CONSUMERS),
                ),
                (
                    _consume_queries,
                    (shared, tile_slots, work, numbers, outputs, 1, HEAD_DIM, BLOCK_M, STAGES, HAS_RIGHT, CONSUMERS),
                ),
                (
                    _consume_queries,
                    (shared, tile_slots, work, numbers, outputs, 2, HEAD_DIM, BLOCK_M, STAGES, HAS_RIGHT, CONSUMERS),
                ),
                (_produce_queries, (shared, tile_slots, work, descs, BLOCK_M, STAGES, CONSUMERS)),
            ],
            [4, 4, 1],
            [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS],
        )

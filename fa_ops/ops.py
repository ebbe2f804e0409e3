"""The ops: `modelopt::varlen_attention`, its backward, their fakes and their autograd.

A call flows so: the op's body checks its arguments, allocates its outputs and either launches the Triton kernels or,
for CPU tensors, calls the opaque CPU op. dynamo and export see one op; AOTAutograd sees what its body does.
"""

import functools
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._library.triton
from torch import Tensor
from torch._library.triton import is_wrap_triton_enabled, set_wrap_triton_enabled

from fa_ops import cpu_ops, decoding, hopper, hopper_backward, hopper_sparse, key_ranges
from fa_ops.kernels import tier
from fa_ops.launching import (
    HAS_TRITON,
    IS_INTERPRETED,
    clearing_grid,
    device_of,
    dlse_strides,
    launch_kernel,
    leading_strides,
    lse_strides,
    mask_strides,
    page_counts,
    paging,
    remember,
    require_triton,
    strides_of,
    tile_constants,
    tile_of,
    with_positive_scale,
)
from fa_ops_meta import checks, flops, outputs
from fa_ops_meta.paging import key_extent
from fa_ops_meta.schema import bind
from fa_ops_meta.skip import VISIT_ORDER, VISIT_ORDERS
from fa_ops_meta.window import UNLIMITED, window_bounds

if HAS_TRITON:
    from fa_ops.kernels.backward import attention_backward_dkv_kernel, attention_backward_dq_kernel
    from fa_ops.kernels.backward_tiles import backward_tiles_kernel
    from fa_ops.kernels.configs import block_dim
    from fa_ops.kernels.decode import attention_combine_kernel, attention_decode_kernel
    from fa_ops.kernels.forward import attention_forward_kernel
    from fa_ops.kernels.tiles import tile_list_kernel

logger = logging.getLogger(__name__)


def _varlen_attention(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # sizes are symbols where the body is traced
    admit = _admit if is_wrap_triton_enabled() else _admit_again
    reason = admit(
        tier.TIER, q, k, v, b_start_loc, b_seq_len, max_input_len, is_causal, softmax_scale,
        b_start_loc_k, b_seq_len_k, max_input_len_k, window_left, window_right, softcap, sinks, key_mask, block_table,
        deterministic, skip_softmax_threshold, skip_softmax_block_q, skip_softmax_block_k,
    )  # fmt: skip
    b_start_loc, b_seq_len, start_k, length_k, sinks = _contiguous_metadata(
        b_start_loc, b_seq_len, b_start_loc_k, b_seq_len_k, sinks
    )
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    window_left, right = window_bounds(is_causal, window_left, window_right)
    threshold = _expand_threshold(skip_softmax_threshold, b_seq_len.shape[0], q.shape[-2])
    skip_blocks = None if threshold is None else (skip_softmax_block_q, skip_softmax_block_k)
    if q.device.type == "cpu" and not IS_INTERPRETED:
        tensors = (q, k, v, b_start_loc, b_seq_len, start_k, length_k, key_mask, sinks)
        numbers = (scale, softcap, window_left, right)
        if skip_blocks is not None:
            return cpu_ops.skip_forward(*tensors, block_table, threshold, *numbers, *skip_blocks)
        return *cpu_ops.forward(*tensors, block_table, *numbers), *outputs.empty_skip(q, k, b_seq_len, None)

    is_hopper = reason is None
    if is_hopper:
        logger.debug("varlen_attention: sm_90 kernel%s", "" if skip_blocks is None else ", sparse")
        shared = (q, k, v, b_start_loc, b_seq_len, start_k, length_k, key_mask)
        if skip_blocks is None:
            out, lse = hopper.attend(*shared, scale, window_left, right)
            block_bits, counts = outputs.empty_skip(q, k, b_seq_len, None)
        else:
            out, lse, block_bits, counts = hopper_sparse.attend(*shared, threshold, scale, right, *skip_blocks)
        if key_mask is None:
            return out, lse, block_bits, counts
        reason = "sequences may have holes in their keys"
    else:
        out, lse = outputs.empty_forward(q, v)
        block_bits, counts = outputs.empty_skip(q, k, b_seq_len, skip_blocks, block_table)
        if skip_blocks is not None:
            block_bits.zero_()
            counts.zero_()
    is_packed, num_seqs, rows_k = q.dim() == 3, b_seq_len.shape[0], key_extent(k, block_table)
    *_, rows_q, heads_q, head_dim = q.shape
    *_, heads_kv, value_dim = v.shape
    if num_seqs * rows_q == 0:
        return out.zero_(), lse.fill_(float("-inf")), block_bits, counts
    q, scale = with_positive_scale(q, scale)
    num_splits = None if is_hopper else decoding.select_splits(q, k, block_table, skip_blocks is not None)
    if num_splits is not None:
        logger.debug("varlen_attention: decode kernel, %s splits", num_splits)
        with device_of(q):
            decoding.launch(
                num_splits, tile_of("decode", q, v, skip_blocks), q, k, v, out, lse,
                (b_start_loc, b_seq_len, start_k, length_k), key_mask, block_table, sinks, threshold,
                block_bits, counts, (scale, softcap, window_left, right), skip_softmax_block_q,
            )  # fmt: skip
        if not is_packed:
            return out, lse, block_bits, counts
    logger.debug("varlen_attention: forward kernel, since %s", reason)
    tile = tile_of("forward", q, v, skip_blocks)
    with device_of(q):
        args = (
            q, k, v, out, lse, b_start_loc, b_seq_len, start_k, length_k,
            b_seq_len if key_mask is None else key_mask, b_seq_len if block_table is None else block_table,
            lse if sinks is None else sinks,
            *((lse, b_seq_len, b_seq_len) if threshold is None else (threshold, block_bits, counts)),
            scale, softcap, window_left, right, num_seqs, rows_q, rows_k, *page_counts(k, block_table),
            *strides_of(q), *strides_of(k), *strides_of(v), *strides_of(out), *lse_strides(lse),
            *mask_strides(key_mask), *leading_strides(block_table), *leading_strides(threshold),
            *leading_strides(block_bits),
        )  # fmt: skip
        constants = {
            "GROUP_SIZE": heads_q // heads_kv, "HEAD_DIM": head_dim, "HEAD_DIM_V": value_dim,
            "BLOCK_D": block_dim(head_dim), "BLOCK_DV": block_dim(value_dim),
            **tile_constants(tile), "HAS_LEFT": window_left >= 0, "HAS_RIGHT": right >= 0,
            "HAS_SOFTCAP": softcap > 0.0, "HAS_SINKS": sinks is not None, "IS_PACKED": is_packed,
            "HAS_KEY_MASK": key_mask is not None,
            "PAGING": paging(k, block_table, tile.block_n if skip_blocks is None else skip_softmax_block_k),
            "SKIP_SOFTMAX": skip_blocks is not None, "SKIP_BLOCK_K": 0 if skip_blocks is None else skip_softmax_block_k,
            "VISIT_ORDER": VISIT_ORDERS.index(VISIT_ORDER),
            "LEAVES_SINGLE_ROWS": num_splits is not None, "HOLES_ONLY": is_hopper,
        }  # fmt: skip
        programs = clearing_grid(num_seqs, rows_q, tile.block_m, heads_q, is_packed)
        launch_kernel(attention_forward_kernel, programs, args, constants)
    return out, lse, block_bits, counts


def _admit(choice: str, *args: Any) -> str | None:
    """Checks the op's arguments; why sm_90's kernel does not run the call, None if it does. choice: of the kernels."""
    checks.check_attention(*args)
    q, k, v, _, b_seq_len, _, _, scale, _, _, _, window_left, _, softcap, sinks, _, block_table, _, threshold, *skip = (
        args
    )
    if q.is_cuda:
        require_triton(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    skip_blocks = None if threshold is None else tuple(skip)
    return hopper.refusal(q, k, v, b_seq_len, scale, window_left, softcap, sinks, block_table, skip_blocks)


_admit_again = remember(_admit)


def _admit_backward(choice: str, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *args: Any) -> str | None:
    """`_admit`, of the backward."""
    checks.check_attention(*args)
    q, k, v, _, b_seq_len, _, _, scale, _, _, _, window_left, _, softcap, _, _, block_table, _, threshold, *_ = args
    checks.check_no_backward(block_table)
    checks.check_gradients(out, lse, dout, dlse)
    if q.is_cuda:
        require_triton(q)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return hopper_backward.refusal(q, k, v, b_seq_len, scale, window_left, softcap, threshold)


_admit_backward_again = remember(_admit_backward)


def _varlen_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    block_bits: Tensor,
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    admit = _admit_backward if is_wrap_triton_enabled() else _admit_backward_again
    reason = admit(
        tier.TIER, dout, dlse, out, lse, q, k, v, b_start_loc, b_seq_len, max_input_len, is_causal, softmax_scale,
        b_start_loc_k, b_seq_len_k, max_input_len_k, window_left, window_right, softcap, sinks, key_mask, block_table,
        deterministic, skip_softmax_threshold, skip_softmax_block_q, skip_softmax_block_k,
    )  # fmt: skip
    b_start_loc, b_seq_len, start_k, length_k, sinks = _contiguous_metadata(
        b_start_loc, b_seq_len, b_start_loc_k, b_seq_len_k, sinks
    )
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    window_left, right = window_bounds(is_causal, window_left, window_right)
    if dout.stride(-1) != 1:
        dout = dout.contiguous()
    skip_blocks = None if skip_softmax_threshold is None else (skip_softmax_block_q, skip_softmax_block_k)
    if q.device.type == "cpu" and not IS_INTERPRETED:
        inputs = (
            q, k, v, b_start_loc, b_seq_len, start_k, length_k, key_mask, sinks, scale, softcap, window_left, right
        )  # fmt: skip
        if skip_blocks is None:
            dq, dk, dv = cpu_ops.backward(dout, dlse, out, lse, *inputs)
        else:
            dq, dk, dv = cpu_ops.skip_backward(dout, dlse, out, lse, block_bits, *inputs, *skip_blocks)
        delta = None
        if sinks is not None:
            delta = torch.einsum("...mhd,...mhd->...hm", out.float(), dout.float())
            delta = delta if dlse is None else delta - dlse
        return dq, dk, dv, _sink_gradients(q, sinks, lse, delta)

    is_hopper = reason is None
    if is_hopper:
        logger.debug("varlen_attention_backward: sm_90 kernels")
        dq, dk, dv, delta = hopper_backward.attend(
            dout, dlse, out, lse, q, k, v, b_start_loc, b_seq_len, start_k, length_k, key_mask, scale, right,
            sinks is not None,
        )  # fmt: skip
        if key_mask is None:
            return dq, dk, dv, _sink_gradients(q, sinks, lse, delta)
        reason = "sequences may have holes in their keys"
    else:
        dq, dk, dv = outputs.empty_backward(q, k, v)
    logger.debug("varlen_attention_backward: portable kernels, since %s", reason)
    # full attention, too, has a window on the right: the kernels without one compile into products that do not overlap
    right = UNLIMITED if right < 0 else right
    is_packed = q.dim() == 3
    num_seqs, rows_q, rows_k = b_seq_len.shape[0], q.shape[-3], k.shape[-3]
    if num_seqs * rows_q * rows_k == 0:
        return dq.zero_(), dk.zero_(), dv.zero_(), _sink_gradients(q, sinks, lse, None if dlse is None else -dlse)
    if sinks is None or not is_hopper:
        delta = torch.empty_like(lse)
    index = (
        b_start_loc, b_seq_len, start_k, length_k,
        b_seq_len if key_mask is None else key_mask, b_seq_len if skip_blocks is None else block_bits,
    )  # fmt: skip
    sizes = (
        scale, softcap, window_left, right, num_seqs, rows_q, rows_k, *strides_of(q), *strides_of(k), *strides_of(v),
        *leading_strides(block_bits),
    )  # fmt: skip
    constants = {
        "GROUP_SIZE": q.shape[-2] // k.shape[-2], "HEAD_DIM": q.shape[-1], "HEAD_DIM_V": v.shape[-1],
        "BLOCK_D": block_dim(q.shape[-1]), "BLOCK_DV": block_dim(v.shape[-1]),
        "HAS_LEFT": window_left >= 0, "HAS_RIGHT": True, "HAS_SOFTCAP": softcap > 0.0,
        "IS_PACKED": is_packed, "HAS_KEY_MASK": key_mask is not None,
        "SKIP_BLOCK_Q": 0 if skip_blocks is None else skip_blocks[0],
        "SKIP_BLOCK_K": 0 if skip_blocks is None else skip_blocks[1], "HOLES_ONLY": is_hopper,
    }  # fmt: skip
    with device_of(q):
        tile = tile_of("dq", q, v, skip_blocks)
        programs = clearing_grid(num_seqs, rows_q, tile.block_m, q.shape[-2], is_packed)
        args = (
            q, k, v, out, lse, dout, lse if dlse is None else dlse, delta, dq, *index, *sizes,
            *strides_of(out), *lse_strides(lse), *mask_strides(key_mask), *strides_of(dout), *dlse_strides(dlse),
            *strides_of(dq),
        )  # fmt: skip
        launch_kernel(
            attention_backward_dq_kernel, programs, args,
            constants | tile_constants(tile) | {"HAS_DLSE": dlse is not None},
        )  # fmt: skip
        tile = tile_of("dkv", q, v, skip_blocks)
        programs = clearing_grid(num_seqs, rows_k, tile.block_n, k.shape[-2], is_packed)
        dkv_args = (
            q, k, v, lse, dout, delta, dk, dv, *index, *sizes,
            *lse_strides(lse), *mask_strides(key_mask), *strides_of(dout), *strides_of(dk), *strides_of(dv),
        )  # fmt: skip
        launch_kernel(attention_backward_dkv_kernel, programs, dkv_args, constants | tile_constants(tile))
    return dq, dk, dv, _sink_gradients(q, sinks, lse, delta)


def _contiguous_metadata(
    b_start_loc: Tensor,
    b_seq_len: Tensor,
    b_start_loc_k: Tensor | None,
    b_seq_len_k: Tensor | None,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """The kernels read them without strides; the keys' ranges are the queries' unless given."""
    b_start_loc, b_seq_len = b_start_loc.contiguous(), b_seq_len.contiguous()
    start_k = b_start_loc if b_start_loc_k is None else b_start_loc_k.contiguous()
    length_k = b_seq_len if b_seq_len_k is None else b_seq_len_k.contiguous()
    return b_start_loc, b_seq_len, start_k, length_k, None if sinks is None else sinks.contiguous()


def _expand_threshold(threshold: Tensor | None, num_seqs: int, heads: int) -> Tensor | None:
    """(B, Hq), without a copy."""
    if threshold is None or threshold.dim() == 2:
        return threshold
    return threshold.reshape(-1, 1).expand(num_seqs, heads)


def _sink_gradients(q: Tensor, sinks: Tensor | None, lse: Tensor, delta: Tensor | None) -> Tensor:
    """-sum over rows of exp(sink - lse) * delta; rows of no sequence have lse = -inf, and no delta."""
    dsinks = outputs.empty_dsinks(q, sinks)
    if sinks is None or delta is None:
        return dsinks.zero_()
    weight = torch.where(lse == float("-inf"), 0.0, torch.exp(sinks.float()[:, None] - lse))
    rows = torch.where(lse == float("-inf"), 0.0, weight * delta)
    return dsinks.copy_(-rows.sum(-1) if rows.dim() == 2 else -rows.sum((0, -1)))


def is_available() -> bool:
    """Whether the kernels can run here; asks the driver."""
    if not HAS_TRITON or IS_INTERPRETED:
        return HAS_TRITON
    return (
        torch.version.hip is None
        and torch.cuda.is_available()
        and torch.cuda.get_device_capability() >= checks.MIN_CAPABILITY
    )


def _register_sharding_rules() -> None:
    """DTensor takes longer to import than all of ours, so its rules wait until somebody else has imported it. DTensor
    asks the fakes what the outputs look like before it looks for a rule."""
    if "torch.distributed.tensor" in sys.modules:
        from fa_ops_meta import sharding

        sharding.register_sharding_rules()


def _fake_forward(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _register_sharding_rules()
    checks.check_attention(*args)
    given = bind(torch.ops.modelopt.varlen_attention.default, args)
    skip_blocks = None
    if given["skip_softmax_threshold"] is not None:
        skip_blocks = given["skip_softmax_block_q"], given["skip_softmax_block_k"]
    q, k, v = args[:3]
    skip = outputs.empty_skip(q, k, given["b_seq_len"], skip_blocks, given["block_table"])
    return *outputs.empty_forward(q, v), *skip


def _fake_backward(dout, dlse, out, lse, block_bits, *args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _register_sharding_rules()
    checks.check_attention(*args)
    given = bind(torch.ops.modelopt.varlen_attention.default, args)
    checks.check_no_backward(given["block_table"])
    checks.check_gradients(out, lse, dout, dlse)
    q, k, v = args[:3]
    return *outputs.empty_backward(q, k, v), outputs.empty_dsinks(q, given["sinks"])


def _setup_context(ctx, inputs, output) -> None:
    checks.check_no_backward(inputs[BLOCK_TABLE])
    out, lse, block_bits, counts = output
    is_tensor = [isinstance(x, Tensor) for x in inputs]
    ctx.save_for_backward(out, lse, block_bits, *(x for x, t in zip(inputs, is_tensor, strict=True) if t))
    ctx.is_tensor = is_tensor
    ctx.scalars = [x for x, t in zip(inputs, is_tensor, strict=True) if not t]
    q, start, length, start_k, length_k = (inputs[i] for i in (0, *RANGES))
    # a padded sequence has keys of its own, and ranges of queries do not overlap
    ctx.may_overlap = q.dim() == 3 and start_k is not None and (start_k is not start or length_k is not length)
    ctx.mark_non_differentiable(block_bits, counts)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout: Tensor | None, dlse: Tensor | None, *_):
    out, lse, block_bits, *tensors = ctx.saved_tensors
    tensors, scalars = iter(tensors), iter(ctx.scalars)
    args = [next(tensors if t else scalars) for t in ctx.is_tensor]
    if ctx.may_overlap and any(ctx.needs_input_grad[1:3]):
        starts, lengths = RANGES[2:]
        given = args[starts], args[lengths], args[1].shape[0], dlse if dout is None else dout
        args[starts] = _without_autograd(key_ranges.disjoint_starts, given)
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, dsinks = _without_autograd(
        torch.ops.modelopt.varlen_attention_backward, (dout, dlse, out, lse, block_bits, *args)
    )
    grads = [dq, dk, dv, *[None] * (len(args) - 3)]
    if args[SINKS] is not None:
        grads[SINKS] = dsinks
    return tuple(grads)


class _EagerAttention(torch.autograd.Function):
    """What `register_autograd` makes of `_setup_context` and `_backward`, but for its search for defaults of arguments,
    which takes longer than all the rest of a call."""

    @staticmethod
    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            output = torch.ops.modelopt.varlen_attention(*args)
        _setup_context(ctx, args, output)
        return output

    @staticmethod
    def backward(ctx, *grads):
        return _backward(ctx, *grads)


def _is_eager() -> bool:
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None


def _needs_grad(args: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*args)


def attend(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`torch.ops.modelopt.varlen_attention`, given all its arguments, for less of the CPU's time in eager mode."""
    if _is_eager() and _needs_grad(args):
        return _EagerAttention.apply(*args)
    return _without_autograd(torch.ops.modelopt.varlen_attention, args)


def _without_autograd(op: Any, args: Sequence[Any]) -> Any:
    """The op, whose autograd, in eager mode and where no gradient is asked for, would take half as long as all the rest
    to find that it has nothing to do."""
    if not _is_eager() or _needs_grad(args):
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _define_op(name: str, body: Any, fake: Callable) -> Any:
    if IS_INTERPRETED or not HAS_TRITON:
        op = torch.library.custom_op(name, body, mutates_args=())
    else:
        # triton_op reads the source of the function it is given in search of kernels, and imports Inductor to do so
        # (0.8 s). A partial object has no source; the kernels are listed below.
        sourceless: Any = functools.partial(body)
        sourceless.__globals__ = body.__globals__  # where infer_schema looks annotations up
        op = torch.library.triton_op(name, sourceless, mutates_args=())
        _library.impl(name, _without_wrappers(body), "CUDA")
    op.register_fake(fake)
    return op


def _without_wrappers(body: Callable) -> Callable:
    """What `triton_op` runs on CUDA tensors, but for its search for outputs that are inputs, in the data of all."""

    @torch._disable_dynamo
    def run(*args: Any) -> Any:
        with set_wrap_triton_enabled(False):
            return body(*args)

    return run


_library = torch.library.Library("modelopt", "FRAGMENT")


_forward_op = _define_op("modelopt::varlen_attention", _varlen_attention, _fake_forward)
_NAMES = [argument.name for argument in torch.ops.modelopt.varlen_attention.default._schema.arguments]
SINKS, BLOCK_TABLE = _NAMES.index("sinks"), _NAMES.index("block_table")
RANGES = [_NAMES.index(name) for name in ("b_start_loc", "b_seq_len", "b_start_loc_k", "b_seq_len_k")]
_forward_op.register_autograd(_backward, setup_context=_setup_context)
_define_op("modelopt::varlen_attention_backward", _varlen_attention_backward, _fake_backward)

if HAS_TRITON and not IS_INTERPRETED:
    # AOTAutograd's cache key holds the source of the kernels, and of all that they call, of the ops in dynamo's graph.
    # That graph holds the forward op alone, so its entry lists the backward's kernels too.
    _backward_kernels = [attention_backward_dq_kernel, attention_backward_dkv_kernel]
    # Which opaque ops the bodies call is in no kernel's source: one kernel of each stands for it.
    _forward_kernels = [attention_forward_kernel, attention_decode_kernel, attention_combine_kernel]
    if tier.TIER != "portable":
        _forward_kernels.append(tile_list_kernel)
        _backward_kernels.append(backward_tiles_kernel)
    torch._library.triton.triton_ops_to_kernels.update({
        "modelopt::varlen_attention": [*_forward_kernels, *_backward_kernels],
        "modelopt::varlen_attention_backward": _backward_kernels,
    })  # fmt: skip

flops.register_flop_formulas()

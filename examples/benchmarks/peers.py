"""What a user would take instead: each function binds one implementation to a case's data and returns a Run."""

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from cases import Case
from timing import Run
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import fa_ops
from fa_ops.kernels import tier


@dataclass
class Data:
    """Packed random inputs of a case: q (total, Hq, D), k and v (total, Hkv, D), dout like q; starts and lengths (B,)
    and cu_seqlens (B + 1,), int32, on the same device."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    starts: Tensor
    lengths: Tensor
    cu_seqlens: Tensor


def make_data(case: Case, device: str, seed: int = 0) -> Data:
    generator = torch.Generator(device).manual_seed(seed)
    total = case.cu_seqlens[-1]

    def draw(num_heads: int) -> Tensor:
        shape = (total, num_heads, case.head_dim)
        return torch.randn(shape, generator=generator, device=device, dtype=case.torch_dtype)

    cu_seqlens = torch.tensor(case.cu_seqlens, dtype=torch.int32, device=device)
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    q, dout = draw(case.num_heads_q), draw(case.num_heads_q)
    k, v = draw(case.num_heads_kv), draw(case.num_heads_kv)
    return Data(q, k, v, dout, cu_seqlens[:-1].contiguous(), lengths, cu_seqlens)


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().clone().requires_grad_() for tensor in tensors)


def packed_run(attention: Callable[[Tensor, Tensor, Tensor], Tensor], data: Data) -> Run:
    """A run of `attention(q, k, v) -> out` on packed tensors."""
    inputs = leaves(data.q, data.k, data.v)
    return Run(inputs, lambda: (attention(*inputs),), (data.dout,), lambda outputs: outputs[0], lambda grad: grad)


def ours(case: Case, data: Data) -> Run:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return fa_ops.attention(q, k, v, data.starts, data.lengths, max(case.lengths), is_causal=case.is_causal)

    return packed_run(attention, data)


@contextlib.contextmanager
def portable_tier() -> Iterator[None]:
    """As with FA_OPS_KERNEL=portable: the Triton kernels that run on any GPU, whatever the device has besides."""
    before = tier.TIER
    tier.TIER = "portable"
    try:
        yield
    finally:
        tier.TIER = before


class PortableRun(Run):
    """A run whose forward and backward take the portable kernels."""

    def backward(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with portable_tier():
            return super().backward(outputs)


def ours_portable(case: Case, data: Data) -> Run:
    run = ours(case, data)
    forward = portable_tier()(run.forward)
    return PortableRun(run.inputs, forward, run.grad_outputs, run.pack_outputs, run.pack_gradient)


def sdpa(q: Tensor, k: Tensor, v: Tensor, **arguments) -> Tensor:
    """F.scaled_dot_product_attention on (B, S, H, D), the layout that projections produce."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **arguments).transpose(1, 2)


def sdpa_sum(case: Case, data: Data) -> Run:
    """One SDPA call per sequence; the outputs stay apart, so this is the bare sum of the calls."""
    inputs = leaves(data.q, data.k, data.v)

    def forward() -> tuple[Tensor, ...]:
        sequences = zip(*(x[None].split(case.lengths, dim=1) for x in inputs), strict=True)
        return tuple(sdpa(q, k, v, is_causal=case.is_causal) for q, k, v in sequences)

    grad_outputs = data.dout[None].split(case.lengths, dim=1)
    return Run(inputs, forward, grad_outputs, lambda outputs: torch.cat(outputs, dim=1)[0], lambda grad: grad)


def sdpa_loop(case: Case, data: Data) -> Run:
    """The hand-written loop: one SDPA call per sequence, the outputs packed again."""
    parts = sdpa_sum(case, data)
    return Run(parts.inputs, lambda: (parts.pack_outputs(parts.forward()),), (data.dout,), lambda o: o[0], lambda g: g)


def sdpa_padded(case: Case, data: Data) -> Run:
    """One SDPA call on the batch padded to its longest sequence; the mask exists beforehand."""
    longest, device = max(case.lengths), data.q.device
    positions = torch.arange(longest, device=device)
    valid = positions < data.lengths[:, None]

    def pad(x: Tensor) -> Tensor:
        padded = x.new_zeros(len(case.lengths), longest, *x.shape[1:])
        padded[valid] = x
        return padded

    mask = valid[:, None, None, :].expand(-1, 1, longest, -1)
    if case.is_causal:
        mask = mask & (positions <= positions[:, None])
    inputs = leaves(pad(data.q), pad(data.k), pad(data.v))
    return Run(
        inputs,
        lambda: (sdpa(*inputs, attn_mask=mask),),
        (pad(data.dout),),
        lambda outputs: outputs[0][valid],
        lambda grad: grad[valid],
    )


def sdpa_backend(case: Case, data: Data, backend: SDPBackend) -> Run:
    """One SDPA call on a batch of equal lengths through one named backend; other backends are refused."""
    if not case.is_fixed_length:
        raise ValueError(f"SDPA through {backend.name} needs sequences of equal length, got {case.lengths}")
    shape = (len(case.lengths), case.lengths[0])
    inputs = leaves(*(x.unflatten(0, shape) for x in (data.q, data.k, data.v)))

    def forward() -> tuple[Tensor, ...]:
        with sdpa_kernel(backend):
            return (sdpa(*inputs, is_causal=case.is_causal),)

    dout = data.dout.unflatten(0, shape)
    return Run(inputs, forward, (dout,), lambda outputs: outputs[0].flatten(0, 1), lambda grad: grad.flatten(0, 1))


def flex(case: Case, data: Data) -> Run:
    """Compiled FlexAttention: the batch as it is when the lengths are equal, else one row with a document mask."""
    shape = (len(case.lengths), case.lengths[0]) if case.is_fixed_length else (1, sum(case.lengths))
    device = data.q.device
    document = torch.repeat_interleave(torch.arange(len(case.lengths), device=device), data.lengths)

    def causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return query >= key

    def same_document(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = document[query] == document[key]
        return same & (query >= key) if case.is_causal else same

    mask = None
    if not case.is_fixed_length or case.is_causal:
        rule = causal if case.is_fixed_length else same_document
        mask = create_block_mask(rule, None, None, shape[1], shape[1], device=device)
    inputs = leaves(*(x.unflatten(0, shape) for x in (data.q, data.k, data.v)))
    # Without this, the recompilation limit would end compilation after a few shapes.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    def forward() -> tuple[Tensor, ...]:
        q, k, v = (x.transpose(1, 2) for x in inputs)
        out = compiled(q, k, v, block_mask=mask, enable_gqa=case.num_heads_q != case.num_heads_kv)
        return (out.transpose(1, 2),)

    dout = data.dout.unflatten(0, shape)
    return Run(inputs, forward, (dout,), lambda outputs: outputs[0].flatten(0, 1), lambda grad: grad.flatten(0, 1))


def torch_varlen(case: Case, data: Data) -> Run:
    """torch.nn.attention.varlen.varlen_attn, whose arguments for causal and GQA depend on the version of torch."""
    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters
    arguments: dict[str, object] = {}
    if case.is_causal:
        arguments |= {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    if case.num_heads_q != case.num_heads_kv:
        if "enable_gqa" not in parameters:
            raise NotImplementedError(f"varlen_attn of torch {torch.__version__} has no enable_gqa")
        arguments["enable_gqa"] = True
    longest = max(case.lengths)

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attn(q, k, v, data.cu_seqlens, data.cu_seqlens, longest, longest, **arguments)

    return packed_run(attention, data)


def external(case: Case, data: Data, function: Callable[..., Tensor]) -> Run:
    """A user's own `function(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, causal) -> out`.

    Packed: q and out are (total, Hq, D), k and v (total, Hkv, D); cumulative lengths (B + 1,) int32 on their device;
    longest lengths int, causal bool. Without an autograd formula, its backward is a row with an error.
    """
    longest, cu_seqlens = max(case.lengths), data.cu_seqlens

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return function(q, k, v, cu_seqlens, cu_seqlens, longest, longest, case.is_causal)

    return packed_run(attention, data)


def load_external(path: str) -> Callable[[Case, Data], Run]:
    module, separator, name = path.partition(":")
    if not separator:
        raise ValueError(f"peer must be given as module:function, got {path!r}")
    return partial(external, function=getattr(importlib.import_module(module), name))


PEERS: dict[str, Callable[[Case, Data], Run]] = {
    "fa_ops": ours,
    "fa_ops_portable": ours_portable,
    "sdpa_sum": sdpa_sum,
    "sdpa_loop": sdpa_loop,
    "sdpa_padded": sdpa_padded,
    "sdpa_cudnn": partial(sdpa_backend, backend=SDPBackend.CUDNN_ATTENTION),
    "sdpa_flash": partial(sdpa_backend, backend=SDPBackend.FLASH_ATTENTION),
    "flex_attention": flex,
    "torch_varlen": torch_varlen,
}

"""Decoding from a paged cache through torch.compile and torch.export: more keys and pages with every step."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fa_ops

PAGES, PAGE_SIZE = 6, 4


def decode(q, k, v, cu_seq_q, seqused_k, block_table):
    return fa_ops.varlen_attn(
        q,
        k,
        v,
        cu_seq_q,
        None,
        1,
        1,
        enable_gqa=True,
        window_size=(-1, 0),
        seqused_k=seqused_k,
        block_table=block_table,
    )


class Decode(torch.nn.Module):
    def forward(self, *args):
        return decode(*args)


def step(num_keys: int, num_seqs: int = 2) -> tuple[torch.Tensor, ...]:
    k, v = torch.randn(2, PAGES, PAGE_SIZE, 2, 16).unbind()
    table = torch.randperm(PAGES, dtype=torch.int32).repeat(num_seqs, 1)
    cu_seq_q = torch.arange(num_seqs + 1, dtype=torch.int32)
    used = torch.full((num_seqs,), num_keys, dtype=torch.int32)
    return torch.randn(num_seqs, 4, 16), k, v, cu_seq_q, used, table


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_frame_for_a_growing_cache(backend, fresh_inductor):
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(decode, fullgraph=True, backend=counter)
    for num_keys in (1, 4, 5, 17, 24):
        tensors = step(num_keys)
        assert torch.equal(compiled(*tensors), decode(*tensors))
    assert counter.frame_count == 1


def test_gradients_are_refused_when_compiled(fresh_compiler):
    q, *others = step(5)
    with pytest.raises(Exception, match="block_table: a Tensor given where a gradient is asked for"):
        torch.compile(decode, fullgraph=True, backend="eager")(q.requires_grad_(), *others)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export(strict, fresh_compiler):
    own = {0: torch.export.Dim.AUTO}
    shapes = ((own, None, None, own, own, own),)
    program = torch.export.export(Decode(), step(7), dynamic_shapes=shapes, strict=strict).module()
    for num_seqs in (2, 3, 5):
        tensors = step(13, num_seqs)
        assert torch.equal(program(*tensors), decode(*tensors))

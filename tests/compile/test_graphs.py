"""The schemas, which saved programs hold, and the graphs that dynamo, export and AOTAutograd capture."""

import operator
import textwrap

import pytest
import torch
from expecttest import assert_expected_inline
from torch._dynamo.testing import AotEagerAndRecordGraphs

import fa_ops
from tests.support.problems import small_case

OPS = torch.ops.modelopt


class Attention(torch.nn.Module):
    def forward(self, q, k, v, b_start_loc, b_seq_len):
        return fa_ops.attention(q, k, v, b_start_loc, b_seq_len, return_lse=True)


def call_nodes(graph_module: torch.fx.GraphModule) -> list[torch.fx.Node]:
    """The calls of a graph; without getitem and detach, which torch places as it likes."""
    uninteresting = (operator.getitem, torch.ops.aten.detach.default)
    return [x for x in graph_module.graph.nodes if x.op == "call_function" and x.target not in uninteresting]


def called_ops(graph_module: torch.fx.GraphModule) -> list:
    return [node.target for node in call_nodes(graph_module)]


def calls(graph_module: torch.fx.GraphModule) -> str:
    """The calls of a graph, one a line."""
    return "\n".join(wrap(f"{x.target}({', '.join(map(str, x.args))})") for x in call_nodes(graph_module))


def wrap(line: str) -> str:
    return textwrap.fill(line, 110, subsequent_indent="    ", break_long_words=False)


def schema(op: torch._ops.OpOverload) -> str:
    return wrap(str(op._schema))


def small_tensors() -> tuple[torch.Tensor, ...]:
    inputs = small_case().build()
    return inputs.q, inputs.k, inputs.v, inputs.b_start_loc, inputs.b_seq_len


@pytest.fixture
def recorded(fresh_compiler) -> AotEagerAndRecordGraphs:
    """The graphs of one compiled call, forward and backward."""
    backend = AotEagerAndRecordGraphs()
    q, k, v, start, length = small_tensors()
    compiled = torch.compile(fa_ops.attention, fullgraph=True, backend=backend)
    compiled(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), start, length).backward(torch.ones_like(q))
    return backend


def test_schema():
    assert_expected_inline(
        schema(OPS.varlen_attention.default),
        """\
modelopt::varlen_attention(Tensor q, Tensor k, Tensor v, Tensor b_start_loc, Tensor b_seq_len, SymInt?
    max_input_len=None, bool is_causal=True, float? softmax_scale=None, Tensor? b_start_loc_k=None, Tensor?
    b_seq_len_k=None, SymInt? max_input_len_k=None, SymInt window_left=-1, SymInt window_right=-1, float
    softcap=0., Tensor? sinks=None, Tensor? key_mask=None, Tensor? block_table=None, bool deterministic=True,
    Tensor? skip_softmax_threshold=None, SymInt skip_softmax_block_q=64, SymInt skip_softmax_block_k=128) ->
    (Tensor, Tensor, Tensor, Tensor)""",
    )


def test_schema_of_the_backward():
    assert_expected_inline(
        schema(OPS.varlen_attention_backward.default),
        """\
modelopt::varlen_attention_backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor block_bits,
    Tensor q, Tensor k, Tensor v, Tensor b_start_loc, Tensor b_seq_len, SymInt? max_input_len=None, bool
    is_causal=True, float? softmax_scale=None, Tensor? b_start_loc_k=None, Tensor? b_seq_len_k=None, SymInt?
    max_input_len_k=None, SymInt window_left=-1, SymInt window_right=-1, float softcap=0., Tensor? sinks=None,
    Tensor? key_mask=None, Tensor? block_table=None, bool deterministic=True, Tensor?
    skip_softmax_threshold=None, SymInt skip_softmax_block_q=64, SymInt skip_softmax_block_k=128) -> (Tensor,
    Tensor, Tensor, Tensor)""",
    )


@pytest.mark.parametrize("name", ["varlen_attention", "varlen_attention_backward"])
def test_one_overload_that_is_functional(name):
    assert getattr(OPS, name).overloads() == ["default"]
    found = getattr(OPS, name).default._schema
    assert not found.is_mutable
    assert not any(argument.kwarg_only for argument in found.arguments)
    assert not any(result.alias_info for result in found.returns)


@pytest.mark.parametrize("name", ["varlen_attention", "varlen_attention_backward"])
def test_tagged_as_compilable(name):
    assert torch.Tag.pt2_compliant_tag in getattr(OPS, name).default.tags


def test_dynamo_sees_one_op(recorded):
    assert len(recorded.graphs) == 1
    assert_expected_inline(
        calls(recorded.graphs[0]),
        """\
modelopt.varlen_attention(l_q_, l_k_, l_v_, l_b_start_loc_, l_b_seq_len_, None, True, None, None, None, None,
    -1, -1, 0.0, None, None, None, True, None, 64, 128)""",
    )


def test_aot_autograd_sees_the_inner_op(recorded):
    assert len(recorded.fw_graphs) == len(recorded.bw_graphs) == 1
    assert called_ops(recorded.fw_graphs[0]) == [OPS._varlen_attention_cpu.default]
    assert called_ops(recorded.bw_graphs[0]) == [OPS._varlen_attention_backward_cpu.default]


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_export_sees_one_op(strict, fresh_compiler):
    exported = torch.export.export(Attention(), small_tensors(), strict=strict)
    assert_expected_inline(
        calls(exported.graph_module), """modelopt.varlen_attention.default(q, k, v, b_start_loc, b_seq_len)"""
    )
    assert calls(exported.run_decompositions().graph_module) == calls(exported.graph_module)

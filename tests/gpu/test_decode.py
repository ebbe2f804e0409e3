"""Paged caches and split decoding on a GPU, by either kernel."""

import pytest
import torch
from torch._inductor.utils import fresh_cache

import fa_ops
from fa_ops import decoding
from fa_ops.reference import attention_reference
from tests.support import properties
from tests.support.accuracy import check_case
from tests.support.paged import paged, to_pages
from tests.support.problems import decoding_case, small_case

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LENS_K = (1, 5000, 64, 20_000)
FEATURES = {
    "plain": {},
    "window_sinks": {"window_size": (700, -1), "has_sinks": True},
    "softcap_key_mask": {"softcap": 20.0, "key_mask": "random"},
    "head_major": {"memory": "head_major", "has_dlse": True},
}


@pytest.fixture(params=["forward", "decode"])
def kernel(request, monkeypatch):
    if request.param == "forward":
        monkeypatch.setattr(decoding, "select_splits", lambda *_: None)


def sizes(head_dim: int, dtype: torch.dtype, **changes) -> dict:
    return {"head_dim": head_dim, "value_dim": head_dim, "dtype": dtype, "group_size": 4, **changes}


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoding(dtype, head_dim, features, kernel):
    case = decoding_case(LENS_K, **sizes(head_dim, dtype, **features))
    check_case(fa_ops.attention, case, "cuda", is_lse_float32=False)


@pytest.mark.parametrize("page_size", [1, 16, 48, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_paged_caches(dtype, page_size, kernel):
    case = small_case(lens_q=(1, 300, 0, 1), lens_k=(2000, 700, 9, 65), **sizes(128, dtype))
    check_case(paged(page_size), case, "cuda", is_lse_float32=False, has_backward=False)


@pytest.mark.parametrize("num_splits", [1, 8, 32])
@pytest.mark.parametrize("num_keys", [1, 2049, 9973, 20_000])
def test_counts_of_skip_softmax(num_keys, num_splits, monkeypatch):
    monkeypatch.setattr(decoding, "select_splits", lambda *args: num_splits)
    case = decoding_case((num_keys,), **sizes(128, torch.bfloat16, skip_share=0.5))
    inputs = case.build("cuda")
    found, expected = (
        inputs.call(f, inputs.q, inputs.k, inputs.v, return_skip_counts=True)[-1]
        for f in (fa_ops.attention, attention_reference)
    )
    assert torch.equal(found, expected)
    check_case(fa_ops.attention, case, "cuda", is_lse_float32=False)


@pytest.mark.parametrize("skip_share", [None, 0.5], ids=["dense", "skip_softmax"])
def test_bits(skip_share, kernel):
    case = decoding_case((5000, 3, 700), **sizes(64, torch.bfloat16, skip_share=skip_share))
    properties.check_repeats(fa_ops.attention, case, "cuda", repeats=50)
    properties.check_batch_invariance(fa_ops.attention, case, "cuda")


@pytest.mark.parametrize("skip_share", [None, 0.5], ids=["dense", "skip_softmax"])
def test_compiled(skip_share, tmp_path):
    """With one threshold for all sequences and heads: a tensor whose elements lie in one place."""
    case = decoding_case((5000, 3, 700), **sizes(128, torch.bfloat16, skip_share=skip_share, skip_form="scalar"))
    inputs = case.build("cuda")
    with fresh_cache(dir=str(tmp_path)):
        torch.compiler.reset()
        compiled = torch.compile(fa_ops.attention, fullgraph=True)
        found, expected = (
            dict(zip(("out", "lse"), inputs.call(f, inputs.q, inputs.k, inputs.v), strict=True))
            for f in (compiled, fa_ops.attention)
        )
    properties.assert_same_bits(found, expected, "when compiled")


def test_cuda_graph_replays_with_other_lengths(kernel):
    inputs = small_case(lens_q=(1, 1, 1), lens_k=(900, 4000, 70), **sizes(128, torch.bfloat16)).build("cuda")
    k, v, table = to_pages(inputs.canaries, inputs.k, inputs.v, inputs.b_start_loc_k, inputs.b_seq_len_k, 16)
    used, table = inputs.b_seq_len_k.clone(), table.clone()
    cu_seq_q = torch.arange(4, device="cuda", dtype=torch.int32)

    def step() -> torch.Tensor:
        return fa_ops.varlen_attn(
            inputs.q, k, v, cu_seq_q, None, 1, 1, enable_gqa=True, seqused_k=used, block_table=table
        )

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for lengths in ((900, 4000, 70), (1, 3999, 17), (0, 64, 2)):
        used.copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(captured, step())

"""torch.library.opcheck of the op and of its backward: schema, autograd registration, fakes, AOTAutograd."""

import pytest
import torch

from tests.support.cases import Case, Inputs
from tests.support.paged import paged_arguments
from tests.support.problems import op_arguments, small_case

FORWARD = torch.ops.modelopt.varlen_attention.default
BACKWARD = torch.ops.modelopt.varlen_attention_backward.default
UTILITIES = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
    "test_aot_dispatch_static",
)
# opcheck itself fails on views that are both empty and gapped, so what is empty here is contiguous.
VARIANTS = {
    "contiguous": small_case(),
    "head_major": small_case(memory="head_major"),
    "fused_qkv": small_case(memory="fused_qkv"),
    "gapped": small_case(memory="gapped"),
    "padded_right": small_case(is_padded=True),
    "padded_left_key_mask": small_case(is_padded=True, placement="left", key_mask="random"),
    "padded_head_major_keys_longer": small_case(is_padded=True, lens_k=(9, 8), memory="head_major"),
    "padded_one_sequence_all_masked": small_case(is_padded=True, key_mask="all"),
    "empty_sequences": small_case(lens_q=(0, 5, 0)),
    "all_sequences_empty": small_case(lens_q=(0, 0)),
    "rows_outside_every_sequence": small_case(placement="gaps", seed=1),
    "len_q_above_len_k": small_case(lens_q=(9, 4), lens_k=(4, 6)),
    "len_k_zero": small_case(lens_q=(3, 4), lens_k=(0, 6)),
    "no_sequences_packed": small_case(lens_q=()),
    "no_sequences_padded": small_case(is_padded=True, lens_q=()),
    "one_key_head": small_case(heads_kv=1, group_size=3),
    "value_dim": small_case(value_dim=24),
    "int64_metadata": small_case(index_dtype=torch.int64, lens_k=(6, 6)),
    "max_input_len": small_case(max_input_len="exact", lens_k=(6, 6)),
    "full": small_case(is_causal=False, softmax_scale=0.3),
    "window": small_case(window_size=(3, 1), is_causal=False),
    "softcap": small_case(softcap=2.0),
    "sinks": small_case(has_sinks=True, lens_k=(4, 7)),
    "sinks_no_sequences": small_case(has_sinks=True, lens_q=()),
    "window_over_a_cache": small_case(
        is_padded=True, lens_q=(1, 1), lens_k=(9, 8), window_size=(3, 0), memory="head_major"
    ),
    "window_that_shows_nothing": small_case(lens_q=(9, 4), lens_k=(4, 6), window_size=(0, 0), is_causal=False),
    "softcap_value_dim": small_case(softcap=2.0, value_dim=24, placement="gaps"),
    "softcap_float16_padded": small_case(softcap=2.0, dtype=torch.float16, is_padded=True, key_mask="random"),
    "sinks_fused_qkv": small_case(has_sinks=True, memory="fused_qkv", heads_kv=1, group_size=3),
    "sinks_len_k_zero": small_case(has_sinks=True, lens_q=(3, 4), lens_k=(0, 6)),
    "all_features_packed": small_case(
        window_size=(4, 2), softcap=3.0, has_sinks=True, lens_q=(0, 5, 7), is_causal=False, index_dtype=torch.int64
    ),
    "all_features_padded": small_case(
        is_padded=True, key_mask="hole", window_size=(4, -1), softcap=3.0, has_sinks=True, placement="left"
    ),
    "bfloat16": small_case(dtype=torch.bfloat16, has_sinks=True),
    "float16": small_case(dtype=torch.float16, is_padded=True),
}
BACKWARD_VARIANTS = VARIANTS | {
    "dout_expanded": small_case(dout="expanded"),
    "dout_expanded_padded": small_case(dout="expanded", is_padded=True, placement="left"),
    "dout_transposed": small_case(dout="transposed"),
    "dlse": small_case(has_dlse=True),
    "dlse_expanded": small_case(has_dlse=True, dout="expanded"),
    "dlse_padded": small_case(has_dlse=True, is_padded=True, key_mask="hole"),
    "dlse_window_sinks": small_case(has_dlse=True, window_size=(2, -1), has_sinks=True),
    "dlse_all_features_dout_transposed": small_case(
        has_dlse=True, window_size=(2, 1), softcap=3.0, has_sinks=True, is_causal=False, dout="transposed"
    ),
}


def backward_arguments(inputs: Inputs) -> tuple:
    arguments = op_arguments(inputs)
    out, lse, block_bits, _ = FORWARD(*arguments)
    return inputs.dout, inputs.dlse, out, lse, block_bits, *arguments


def variants(cases: dict[str, Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases.values(), ids=cases.keys())


@variants(VARIANTS)
def test_forward(case):
    arguments = op_arguments(case.build())
    for t in arguments:
        if isinstance(t, torch.Tensor) and t.is_floating_point():
            t.requires_grad_()
    torch.library.opcheck(FORWARD, arguments, test_utils=UTILITIES)


@pytest.mark.parametrize("is_padded", [False, True], ids=["packed", "padded"])
def test_forward_without_gradients(is_padded):
    inputs = small_case(is_padded=is_padded).build()
    torch.library.opcheck(FORWARD, op_arguments(inputs), test_utils=UTILITIES)


PAGED_VARIANTS = {
    "packed": small_case(lens_k=(9, 8)),
    "packed_no_sequences": small_case(lens_q=(), lens_k=()),
    "padded": small_case(is_padded=True, lens_k=(9, 8), index_dtype=torch.int64),
    "padded_one_row": small_case(is_padded=True, lens_q=(1, 0), lens_k=(9, 8), value_dim=24, has_sinks=True),
    "skip_softmax": small_case(lens_q=(40, 9), lens_k=(60, 40), skip_share=0.5, skip_block=(16, 16)),
}


@variants(PAGED_VARIANTS)
def test_paged(case):
    torch.library.opcheck(FORWARD, paged_arguments(case.build(), 4), test_utils=UTILITIES)


@variants(BACKWARD_VARIANTS)
def test_backward(case):
    torch.library.opcheck(BACKWARD, backward_arguments(case.build()), test_utils=UTILITIES)


def test_backward_of_lse_alone():
    dout, *rest = backward_arguments(small_case(has_dlse=True).build())
    torch.library.opcheck(BACKWARD, (torch.zeros_like(dout), *rest), test_utils=UTILITIES)


def test_variants_are_what_their_names_say():
    inputs = {name: case.build() for name, case in BACKWARD_VARIANTS.items()}
    assert not inputs["head_major"].k.is_contiguous()
    assert inputs["fused_qkv"].q.untyped_storage().data_ptr() == inputs["fused_qkv"].v.untyped_storage().data_ptr()
    assert set(inputs["dout_expanded"].dout.stride()) == {0}
    gaps = inputs["rows_outside_every_sequence"]
    assert gaps.b_seq_len.sum() < len(gaps.q)
    assert not inputs["padded_one_sequence_all_masked"].sees[0].any()


def test_comparison_of_key_ranges():
    start, length = torch.tensor([4, 0], dtype=torch.int32), torch.tensor([4, 4])
    arguments = start, length, 8, torch.randn(3, 2, 16).transpose(0, 1)
    torch.library.opcheck(torch.ops.modelopt._disjoint_starts.default, arguments, test_utils=UTILITIES)

"""What fa_ops.attention promises beside its numbers."""

import dataclasses
import time

import pytest
import torch
from torch import Tensor

import fa_ops
from fa_ops.reference import attention_reference, visible
from tests.support.accuracy import check_case, evaluate
from tests.support.cases import Inputs
from tests.support.memory import Canaries
from tests.support.problems import small_case
from tests.support.properties import assert_same_bits, check_batch_invariance, check_max_input_len_ignored

LAYOUTS = {"packed": small_case(placement="gaps", seed=1), "padded": small_case(is_padded=True, key_mask="random")}
each_layout = pytest.mark.parametrize("case", LAYOUTS.values(), ids=LAYOUTS.keys())


def leaves(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v))


def results(inputs: Inputs, **options) -> dict[str, Tensor]:
    return evaluate(fa_ops.attention, inputs, **options)


class TestAutocast:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize(
        "given",
        [
            (torch.float32, torch.float32, torch.float32),
            (torch.float32, torch.float32, torch.bfloat16),
            (torch.float16, torch.float32, torch.float32),
        ],
        ids=["float32", "q_k_float32_v_bfloat16", "q_float16"],
    )
    def test_casts(self, given, dtype):
        inputs = small_case().build()
        tensors = [t.to(one) for t, one in zip((inputs.q, inputs.k, inputs.v), given, strict=True)]
        with torch.autocast("cpu", dtype):
            out, lse = inputs.call(fa_ops.attention, *tensors)
        expected_out, expected_lse = inputs.call(fa_ops.attention, *(t.to(dtype) for t in tensors))
        assert (out.dtype, lse.dtype) == (dtype, torch.float32)
        assert torch.equal(out, expected_out)
        assert torch.equal(lse, expected_lse)

    def test_gradients_have_the_dtypes_of_the_inputs(self):
        inputs = small_case().build()
        q, k, v = inputs.q, inputs.k.bfloat16(), inputs.v
        tensors = [t.detach().requires_grad_() for t in (q, k, v)]
        with torch.autocast("cpu", torch.bfloat16):
            out, _ = inputs.call(fa_ops.attention, *tensors)
        gradients = torch.autograd.grad(out.float().sum(), tensors)
        assert [t.dtype for t in gradients] == [torch.float32, torch.bfloat16, torch.float32]

    @pytest.mark.filterwarnings("ignore:CUDA is not available")
    @pytest.mark.parametrize("is_enabled", [False, True], ids=["disabled", "of_another_device"])
    def test_of_no_concern_to_these_tensors(self, is_enabled):
        inputs = small_case().build()
        with torch.autocast("cuda" if is_enabled else "cpu", torch.bfloat16, enabled=is_enabled):
            out, _ = inputs.call(fa_ops.attention, inputs.q, inputs.k, inputs.v)
        assert out.dtype == torch.float32


class TestLengths:
    @pytest.mark.parametrize("lens_k", [None, (9, 6)], ids=["shared", "own_keys"])
    @pytest.mark.parametrize("is_padded", [False, True], ids=["packed", "padded"])
    def test_max_input_len_changes_nothing(self, is_padded, lens_k):
        check_max_input_len_ignored(fa_ops.attention, small_case(is_padded=is_padded, lens_k=lens_k))

    @pytest.mark.parametrize("is_padded", [False, True], ids=["packed", "padded"])
    @pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
    @pytest.mark.parametrize(
        ("starts", "lengths"),
        [
            ((-5, 2), (5, 4)),
            ((2, 4), (-3, 4)),
            ((2**40, 4), (3, 4)),
            ((0, 4), (2, 2**62)),
            ((-(2**62), -1), (2**62, 2**62)),
            ((12, 13), (1, 1)),
            ((11, 0), (100, 0)),
        ],
        ids=["start_below", "length_below", "start_huge", "length_huge", "all_huge", "at_the_end", "past_the_end"],
    )
    def test_out_of_range_never_lead_outside(self, starts, lengths, dtype, is_padded):
        canaries = Canaries()
        rows = (2, 12) if is_padded else (12,)
        q, k, v = (canaries.place(torch.randn(*rows, heads, 16)).requires_grad_() for heads in (4, 2, 2))
        limit = torch.iinfo(dtype)
        start, length = (
            torch.tensor([min(max(x, limit.min), limit.max) for x in values], dtype=dtype)
            for values in (starts, lengths)
        )
        for key_side in ({}, {"b_start_loc_k": length, "b_seq_len_k": start}):
            # packed, some of these key ranges overlap, and keys have no gradient there
            keys = (k, v) if is_padded or not key_side else (k.detach(), v.detach())
            out, lse = fa_ops.attention(q, *keys, start, length, return_lse=True, **key_side)
            differentiable = [t for t in (q, *keys) if t.requires_grad]
            gradients = torch.autograd.grad(out.sum() + lse[lse.isfinite()].sum(), differentiable)
            for t in (out, *gradients):
                assert t.isfinite().all(), "poison from outside"
            assert ((lse > -1e3) | (lse == -torch.inf)).all()
        canaries.check()

    def test_key_side_defaults_to_the_query_side(self):
        inputs = small_case().build()
        expected = results(inputs)
        inputs.b_start_loc_k, inputs.b_seq_len_k = inputs.b_start_loc.long(), inputs.b_seq_len
        assert_same_bits(results(inputs), expected, "with the key side given")

    def test_of_any_strides(self):
        inputs = small_case(lens_q=(6, 6)).build()
        expected = results(inputs)
        inputs.b_start_loc = torch.stack([inputs.b_start_loc, inputs.b_start_loc], 1)[:, 0]
        inputs.b_seq_len = torch.tensor([6], dtype=torch.int64).expand(2)
        assert_same_bits(results(inputs), expected, "for a column and an expanded tensor")

    def test_keys_may_be_shared_in_the_forward(self):
        """Two continuations of one prompt, whose keys are there once."""
        q, kv = torch.randn(2, 7, 4, 16), torch.randn(9, 2, 16)
        start_q, len_q, start_k, len_k = (torch.tensor(x) for x in ([0, 7], [7, 7], [0, 0], [9, 9]))
        shared = fa_ops.attention(q.flatten(0, 1), kv, kv, start_q, len_q, b_start_loc_k=start_k, b_seq_len_k=len_k)
        for continuation, out in zip(q, shared.split(7), strict=True):
            alone = fa_ops.attention(
                continuation, kv, kv, start_q[:1], len_q[:1], b_start_loc_k=start_k[:1], b_seq_len_k=len_k[:1]
            )
            assert torch.equal(out, alone)


class TestValues:
    @pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
    def test_zeros(self, is_causal):
        q, v = torch.zeros(7, 4, 16), torch.randn(7, 2, 16)
        start, length = torch.tensor([0]), torch.tensor([7])
        out, lse = fa_ops.attention(q, q[:, :2], v, start, length, is_causal=is_causal, return_lse=True)
        seen = torch.arange(1, 8) if is_causal else torch.full((7,), 7)
        mean = (v.cumsum(0) if is_causal else v.sum(0)) / seen[:, None, None]
        torch.testing.assert_close(out, mean.repeat_interleave(2, 1))
        torch.testing.assert_close(lse, seen.log().expand(4, 7))

    @pytest.mark.parametrize("scale", [0.0, -0.0])
    @each_layout
    def test_a_scale_of_zero_is_the_mean(self, case, scale):
        inputs = case.build()
        q, k, v = leaves(inputs)
        options = {"key_mask": inputs.key_mask, "softmax_scale": scale, "return_lse": True}
        found, expected = (
            attention(q, k, v, inputs.b_start_loc, inputs.b_seq_len, **options)
            for attention in (fa_ops.attention, attention_reference)
        )
        torch.testing.assert_close(found, expected)
        gradients = torch.autograd.grad(found[0], (q, k, v), inputs.dout)
        assert (gradients[0] == 0).all()
        assert (gradients[1] == 0).all()
        assert gradients[2].abs().sum() > 0

    @pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
    @pytest.mark.parametrize("scale", [-0.2, -1.0, 1.0, 5.0])
    def test_any_scale(self, scale, is_causal):
        check_case(fa_ops.attention, small_case(lens_q=(21, 17), softmax_scale=scale, is_causal=is_causal))


class TestFeatures:
    """Windows, softcap and sinks, where they meet what they generalise."""

    @each_layout
    def test_a_window_of_nothing_ahead_is_causal(self, case):
        causal, inputs = case.build(), dataclasses.replace(case, is_causal=False, window_size=(-1, 0)).build()
        assert_same_bits(results(inputs), results(causal), "between window (-1, 0) and causal")

    @each_layout
    def test_causal_bounds_the_window(self, case):
        inputs, unbounded = (dataclasses.replace(case, window_size=(2, right)).build() for right in (0, 7))
        assert_same_bits(results(inputs), results(unbounded), "for a window ahead of a causal row")

    @each_layout
    @pytest.mark.parametrize("window_size", [(100, 2**40), (2**31 - 1, 2**63 - 1), (2**63 - 1, 2**31 - 1)])
    def test_a_window_wider_than_the_sequences_changes_nothing(self, case, window_size):
        expected = results(dataclasses.replace(case, is_causal=False).build())
        wide = dataclasses.replace(case, is_causal=False, window_size=window_size).build()
        for name, t in results(wide).items():
            torch.testing.assert_close(t, expected[name])
        mask = visible(5, 9, False, None, torch.device("cpu"), window_size)
        assert mask.all()

    def test_rows_without_a_key_have_their_sink_for_lse(self):
        inputs = small_case(lens_q=(9, 4), lens_k=(4, 6), has_sinks=True, placement="gaps").build()
        found = results(inputs)
        rows = slice(int(inputs.b_start_loc[0]), int(inputs.b_start_loc[0]) + 5)
        assert (found["out"][rows] == 0).all()
        assert (found["dq"][rows] == 0).all()
        torch.testing.assert_close(found["lse"][:, rows], inputs.sinks[:, None].expand(4, 5))

    def test_a_sink_of_minus_infinity_is_none(self):
        inputs = small_case(lens_q=(9, 4), lens_k=(4, 6)).build()
        expected = results(inputs)
        found = results(inputs, sinks=torch.full((4,), -torch.inf))
        for name in expected:
            torch.testing.assert_close(found[name], expected[name])

    def test_a_large_softcap_is_none(self):
        expected = results(small_case().build())
        found = results(small_case(softcap=1e6).build())
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


class TestResults:
    @pytest.mark.parametrize("memory", ["contiguous", "head_major", "fused_qkv", "gapped"])
    @pytest.mark.parametrize("is_padded", [False, True], ids=["packed", "padded"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    def test_are_contiguous(self, dtype, is_padded, memory):
        inputs = small_case(dtype=dtype, is_padded=is_padded, memory=memory, value_dim=24).build()
        found = results(inputs)
        rows = inputs.q.shape[:-2]
        assert found["out"].shape == (*rows, 4, 24)
        assert found["lse"].shape == (*rows[:-1], 4, rows[-1])
        assert (found["out"].dtype, found["lse"].dtype) == (dtype, torch.float32)
        for name, t in found.items():
            assert t.is_contiguous(), name

    def test_out_is_the_same_without_lse(self):
        inputs = small_case().build()
        out = fa_ops.attention(inputs.q, inputs.k, inputs.v, inputs.b_start_loc, inputs.b_seq_len)
        assert isinstance(out, Tensor)
        assert torch.equal(out, results(inputs)["out"])

    @pytest.mark.parametrize("deterministic", [None, True, False])
    @each_layout
    def test_are_deterministic(self, case, deterministic):
        inputs = case.build()
        expected = results(inputs)
        for _ in range(5):
            assert_same_bits(results(inputs, deterministic=deterministic), expected, "in a repeat")

    @pytest.mark.parametrize(
        "changes",
        [{}, {"has_dlse": True}, {"value_dim": 24}, {"is_causal": False}, {"dtype": torch.bfloat16}],
        ids=["usual", "dlse", "value_dim", "full", "bfloat16"],
    )
    @pytest.mark.parametrize("is_padded", [False, True], ids=["packed", "padded"])
    def test_do_not_depend_on_the_neighbours(self, is_padded, changes):
        """Each sequence alone gives the bits that it gives amid the others."""
        case = small_case(lens_q=(300, 40, 40, 1, 400), lens_k=(300, 90, 90, 7, 350), is_padded=is_padded, **changes)
        check_batch_invariance(fa_ops.attention, case)

    @pytest.mark.parametrize("changes", [{}, {"has_dlse": True}, {"value_dim": 24}], ids=["usual", "dlse", "value_dim"])
    def test_do_not_depend_on_equal_neighbours(self, changes):
        """Padded rows with the same ranges may be computed together, if that leaves no trace in the bits."""
        check_batch_invariance(
            fa_ops.attention, small_case(lens_q=(600, 600, 30), heads_kv=4, is_padded=True, **changes)
        )

    def test_vmap_is_a_loop(self):
        inputs = small_case().build()
        stacked = [torch.stack([t, -t, t * 2]) for t in (inputs.q, inputs.k, inputs.v)]

        def attend(q, k, v):
            return inputs.call(fa_ops.attention, q, k, v)

        out, lse = torch.vmap(attend)(*stacked)
        for i, tensors in enumerate(zip(*stacked, strict=True)):
            expected_out, expected_lse = attend(*tensors)
            assert torch.equal(out[i], expected_out)
            assert torch.equal(lse[i], expected_lse)


@pytest.mark.slow
def test_overhead_of_a_call(capsys):
    """Python and dispatch of one forward on tiny CPU tensors. The bar is 150 us on an idle machine."""
    q = torch.randn(8, 2, 16)
    start, length = torch.tensor([0]), torch.tensor([8])
    with torch.no_grad():
        seconds = []
        for _ in range(20):
            begin = time.perf_counter()
            for _ in range(100):
                fa_ops.attention(q, q, q, start, length)
            seconds.append((time.perf_counter() - begin) / 100)
    with capsys.disabled():
        print(f"\none forward call on tiny CPU tensors: {min(seconds) * 1e6:.0f} us at best (bar: 150 us)")
    assert min(seconds) < 1e-3

"""The checks checked: what is right passes them, and each way of being wrong is found and named."""

import dataclasses

import pytest
import torch

from fa_ops.reference import attention_reference
from tests.support.accuracy import AccuracyError, ErrorPool, check_case
from tests.support.cases import Case
from tests.support.draw import Profile, draw_case
from tests.support.memory import MARGIN, Canaries, CanaryError, poison_, poisoned_allocations
from tests.support.properties import check_batch_invariance, check_max_input_len_ignored, check_nan_isolation

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
PROFILE = Profile(DTYPES, head_dims=((16, 16), (32, 24)), max_len=70, max_rows_by_heads=800)
CASE = Case(
    seed=0,
    dtype=torch.float32,
    is_padded=True,
    placement="both",
    lens_q=(20, 4, 0),
    lens_k=(12, 9, 5),
    heads_kv=2,
    group_size=2,
    head_dim=16,
    value_dim=24,
    is_causal=True,
    softmax_scale=None,
    key_mask=None,
    memory="gapped",
    dout="dense",
    has_dlse=True,
    index_dtype=torch.int64,
    max_input_len="exact",
)


def plain_torch(*args, **kwargs):
    return attention_reference(*args, **kwargs, upcast=False)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("attention", [attention_reference, plain_torch])
def test_what_is_right_passes(attention, seed: int):
    # what plain torch computes in 16 bits is an lse of 16 bits
    check_case(attention, draw_case(PROFILE, seed), is_lse_float32=attention is attention_reference)


def wrong_scale(q, *args, **kwargs):
    return plain_torch(q * 1.0001, *args, **kwargs)


def slightly_wrong_values(q, k, v, *args, **kwargs):
    out, lse = plain_torch(q, k, v, *args, **kwargs)
    return out * (1 + 2e-6), lse


def not_causal(q, k, v, start, length, max_len, is_causal, *args, **kwargs):
    return plain_torch(q, k, v, start, length, max_len, False, *args, **kwargs)


def lse_in_base_2(*args, **kwargs):
    out, lse = plain_torch(*args, **kwargs)
    return out, lse / 0.6931471805599453


def lse_without_gradient(*args, **kwargs):
    out, lse = plain_torch(*args, **kwargs)
    return out, lse.detach() + 0 * torch.nan_to_num(lse, neginf=0.0)


def lse_zero_where_nothing_is_seen(*args, **kwargs):
    out, lse = plain_torch(*args, **kwargs)
    return out, torch.where(lse.isfinite(), lse, 0.0)


def gradient_of_one_head_of_the_group(q, k, v, *args, **kwargs):
    frozen = k.detach()
    out, lse = plain_torch(q, k, v, *args, **kwargs)
    out_frozen, _ = plain_torch(q, frozen, v, *args, **kwargs)
    is_first = (torch.arange(out.shape[-2]) % 2 == 0)[:, None]
    return torch.where(is_first, out, out_frozen), lse


def nan_where_nothing_is_seen(*args, **kwargs):
    out, lse = plain_torch(*args, **kwargs)
    return torch.where((lse == -torch.inf).transpose(-1, -2)[..., None], torch.nan, out), lse


def half_precision_inside(q, k, v, *args, **kwargs):
    out, lse = plain_torch(q.half(), k.half(), v.half(), *args, **kwargs)
    return out.float(), lse


def output_that_is_never_written(q, k, v, *args, **kwargs):
    out, lse = plain_torch(q, k, v, *args, **kwargs)
    hole = torch.empty(out.shape[-1])
    return torch.cat([out[:, :1] * 0 + hole, out[:, 1:]], 1), lse


def wrong_shape(*args, **kwargs):
    out, lse = plain_torch(*args, **kwargs)
    return out, lse[..., :1]


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (wrong_scale, "out: max error"),
        (slightly_wrong_values, "out: max error"),
        (not_causal, "out: .* came for queries that see no key"),
        (lse_in_base_2, "lse: max error"),
        (lse_without_gradient, "dq: max error"),
        (lse_zero_where_nothing_is_seen, "lse: 0.0 came for queries that see no key"),
        (gradient_of_one_head_of_the_group, "dk: max error"),
        (nan_where_nothing_is_seen, "out: nan came for queries that see no key"),
        (half_precision_inside, "out: max error"),
        (output_that_is_never_written, "out: nan came"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_wrong_is_found(attention, message: str):
    with pytest.raises(AccuracyError, match=message):
        check_case(attention, CASE)


def sinks_without_gradient(*args, sinks, **kwargs):
    return plain_torch(*args, sinks=sinks.detach() + 0 * sinks, **kwargs)


def window_one_key_wider(*args, window_size, **kwargs):
    left, right = window_size
    return plain_torch(*args, window_size=(left + 1, right), **kwargs)


def without_softcap(*args, softcap, **kwargs):
    return plain_torch(*args, **kwargs)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (sinks_without_gradient, "dsinks: max error"),
        (window_one_key_wider, "out: .* came for queries that see no key|out: max error"),
        (without_softcap, "out: max error"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_wrong_with_features_is_found(attention, message: str):
    case = dataclasses.replace(CASE, window_size=(5, 3), softcap=1.5, has_sinks=True)
    check_case(plain_torch, case)
    with pytest.raises(AccuracyError, match=message):
        check_case(attention, case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_lse_of_16_bits_is_held_to_float32(dtype):
    def lse_in_16_bits(*args, **kwargs):
        out, lse = attention_reference(*args, **kwargs)
        return out, lse.to(dtype).float()

    case = dataclasses.replace(CASE, dtype=dtype, has_dlse=False)
    with pytest.raises(AccuracyError, match="lse: max error"):
        check_case(lse_in_16_bits, case)
    check_case(lse_in_16_bits, case, is_lse_float32=False)


def test_mean_error_counts():
    """A hundred thousand small errors pass in max, not in mean."""
    exact = torch.ones(1000, dtype=torch.float64)
    reference = exact.clone()
    reference[0] += 1e-3
    pool = ErrorPool("out")
    pool.add((exact + 1e-3).float(), exact, [reference])
    assert pool.excess().startswith("out: mean error 0.001")
    assert "2 x 1e-06 of plain torch" in pool.excess()


def test_bad_luck_is_told_from_error():
    """One unlucky draw is excused by others in which plain torch is as far off; an error larger than all is not."""
    exact = torch.ones(1000, dtype=torch.float64)
    ours, plain = exact.clone(), exact.clone()
    ours[0], plain[0] = 1 + 2e-5, 1 + 5e-6
    pool = ErrorPool("dq")
    pool.add(ours.float(), exact, [plain])
    assert pool.excess() is not None
    plain[1] = 1 + 2e-5
    pool.add(exact.float(), exact, [plain])
    assert pool.excess() is None
    ours[0] = 1 + 1e-4
    pool.add(ours.float(), exact, [plain])
    assert pool.excess().startswith("dq: max error 0.0001")


@pytest.mark.parametrize("strides", [None, (40, 1)], ids=["contiguous", "gapped"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.bool], ids=str)
def test_canaries_see_every_write(dtype, strides):
    values = torch.ones(3, 16).to(dtype)
    row = 40 if strides else 16
    in_a_gap_or_inside = 20 if strides else 5
    for offset in (-MARGIN, -1, 0, in_a_gap_or_inside, 3 * row):
        canaries = Canaries()
        t = canaries.place(values, strides, "k")
        canaries.check()
        torch.as_strided(t, (1,), (1,), t.storage_offset() + offset).fill_(0)
        with pytest.raises(CanaryError, match=r"^k: 1 elements"):
            canaries.check()


def test_canaries_let_outputs_be_written():
    canaries = Canaries()
    with poisoned_allocations(canaries) as allocated:
        like = torch.randn(4, 6).t()
        made = [
            torch.empty(2, 3),
            torch.empty((2, 3), dtype=torch.float16),
            like.new_empty((0,), dtype=torch.uint8),
            torch.empty_like(like),
            torch.empty_strided((2, 3), (8, 1)),
            like.new_empty_strided((2, 3), (1, 2)),
        ]
    assert [id(t) for t in made] == [id(t) for t in allocated]
    assert [t.stride() for t in made] == [(3, 1), (3, 1), (1,), (1, 6), (8, 1), (1, 2)]
    assert all(t.isnan().all() for t in made if t.dtype.is_floating_point)
    for t in made:
        t.fill_(1)
    canaries.check()
    made[4].as_strided((1,), (1,), made[4].storage_offset() + 5).fill_(0)
    with pytest.raises(CanaryError, match=r"^allocation 4: "):
        canaries.check()
    assert torch.empty(1).storage_offset() == 0


def test_nan_written_over_poison_is_seen():
    t = Canaries().place(torch.ones(2))
    assert not torch.equal(poison_(t).view(torch.int32), torch.full((2,), torch.nan).view(torch.int32))


def test_inputs_are_surrounded_by_nan():
    inputs = CASE.build()
    assert inputs.q.isnan().any()
    for name in ("q", "k", "v", "dout"):
        t = getattr(inputs, name)
        whole = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
        assert whole[:MARGIN].isnan().all()
        assert whole[-MARGIN:].isnan().all()


def leaks_between_sequences(q, k, v, *args, **kwargs):
    out, lse = plain_torch(q, k, v, *args, **kwargs)
    return out + 0 * torch.where(out == 0, 0, out).sum(), lse


def depends_on_the_batch(q, k, v, start, *args, **kwargs):
    out, lse = plain_torch(q, k, v, start, *args, **kwargs)
    return out * (1 + 1e-6 * len(start)), lse


def believes_the_maximum(q, k, v, start, length, max_len, *args, **kwargs):
    believed = length if max_len is None else length.clamp_max(max_len)
    return plain_torch(q, k, v, start, believed, max_len, *args, **kwargs)


@pytest.mark.parametrize(
    ("check", "broken", "message"),
    [
        (check_nan_isolation, leaks_between_sequences, "in sequence 1 for NaN in the q of sequence 0"),
        (check_batch_invariance, depends_on_the_batch, "between sequence 0 alone and in its batch"),
        (check_max_input_len_ignored, believes_the_maximum, "for max_input_len 0"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_properties(check, broken, message: str):
    case = dataclasses.replace(CASE, memory="contiguous")
    check(plain_torch, case)
    with pytest.raises(AssertionError, match=message):
        check(broken, case)


def test_a_seed_is_the_same_case_and_the_same_values():
    case = draw_case(PROFILE, 5)
    assert case == draw_case(PROFILE, 5)
    assert case != draw_case(PROFILE, 6)
    first, second, other = case.build(), case.build(), case.build(draw=1)
    assert torch.equal(first.q.nan_to_num(), second.q.nan_to_num())
    assert not torch.equal(first.q.nan_to_num(), other.q.nan_to_num())
    assert torch.equal(first.b_start_loc, other.b_start_loc)

"""torch.compile(fullgraph=True) on the op: the numbers of eager, to the last bit, and few compiled frames."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import pad

import fa_ops
from fa_ops import cpu
from tests.support.cases import Inputs
from tests.support.problems import small_case

LENGTHS = ((5, 7), (3, 2), (11, 4), (8, 9), (2, 30))
CASES = {
    "packed": small_case(),
    "packed_gaps_fused_qkv_dlse": small_case(placement="gaps", memory="fused_qkv", has_dlse=True),
    "packed_len_q_above_len_k": small_case(lens_q=(9, 4), lens_k=(4, 6), max_input_len="exact"),
    "padded_head_major": small_case(is_padded=True, memory="head_major"),
    "padded_left_key_mask_dlse": small_case(is_padded=True, placement="left", key_mask="random", has_dlse=True),
    "padded_decode": small_case(is_padded=True, lens_q=(1, 1), lens_k=(6, 9), memory="head_major"),
    "window_softcap_sinks": small_case(window_size=(3, -1), softcap=2.0, has_sinks=True, has_dlse=True),
    "empty_sequences": small_case(lens_q=(0, 5, 0)),
    "bfloat16_value_dim": small_case(dtype=torch.bfloat16, value_dim=24),
}


def attend(inputs: Inputs, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """The op between other operations, which are exact in floating point: compiled or not, the bits are the same."""
    out, lse = inputs.call(fa_ops.attention, q * 2, k * 0.5, v * 4)
    return (out * 0.5, lse * 2) if inputs.case.has_dlse else (out * 0.5,)


def run(forward, inputs: Inputs) -> tuple[Tensor, ...]:
    """What `forward` makes of the inputs, and the gradients of that.

    lse is among the results only where it has a gradient: for every result of a compiled function there is a gradient,
    of zeros if need be, and with one for lse the CPU's backward computes otherwise.
    """
    tensors = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    results = forward(inputs, *tensors)
    gradients = torch.autograd.grad(results, tensors, (inputs.dout, inputs.dlse)[: len(results)])
    return *(t.detach() for t in results), *gradients


def check_equals_eager(inputs: Inputs, compiled) -> None:
    torch.testing.assert_close(run(compiled, inputs), run(attend, inputs), rtol=0, atol=0)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_equals_eager(backend, case, fresh_compiler):
    check_equals_eager(case.build(), torch.compile(attend, fullgraph=True, backend=backend))


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[] if name == "padded_left_key_mask_dlse" else pytest.mark.slow)
        for name, case in CASES.items()
    ],
)
def test_equals_eager_with_inductor(case, fresh_inductor):
    check_equals_eager(case.build(), torch.compile(attend, fullgraph=True))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune-no-cudagraphs"])
@pytest.mark.parametrize("is_padded", [False, True], ids=["packed", "padded"])
def test_equals_eager_in_mode(mode, is_padded, fresh_inductor):
    compiled = torch.compile(attend, fullgraph=True, mode=mode)
    for lengths in LENGTHS[:3]:
        check_equals_eager(small_case(lens_q=lengths, is_padded=is_padded).build(), compiled)


def test_reduce_overhead(fresh_inductor):
    q, k, v, start, length = (
        getattr(small_case().build(), name) for name in ("q", "k", "v", "b_start_loc", "b_seq_len")
    )
    compiled = torch.compile(fa_ops.attention, fullgraph=True, mode="reduce-overhead")
    q.requires_grad_()
    expected = fa_ops.attention(q, k, v, start, length)
    for _ in range(3):
        out = compiled(q, k, v, start, length)
        assert torch.equal(out, expected)
        assert torch.equal(*(torch.autograd.grad(t.sum(), q, retain_graph=True)[0] for t in (out, expected)))


@pytest.mark.parametrize("requires_grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("max_input_len", ["none", "exact", "too_small"])
@pytest.mark.parametrize("is_padded", [False, True], ids=["packed", "padded"])
def test_two_frames_for_five_lengths(is_padded, max_input_len, requires_grad, fresh_compiler):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fa_ops.attention, fullgraph=True, backend=counter)
    for lengths in LENGTHS:
        inputs = small_case(lens_q=lengths, is_padded=is_padded, max_input_len=max_input_len).build()
        tensors = [t.detach().requires_grad_(requires_grad) for t in (inputs.q, inputs.k, inputs.v)]
        out, _ = inputs.call(compiled, *tensors)
        assert torch.equal(out, inputs.call(fa_ops.attention, *tensors)[0])
        if requires_grad:
            out.backward(inputs.dout)
    assert 1 <= counter.frame_count <= 2


def test_two_frames_for_five_batch_sizes(fresh_compiler):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fa_ops.attention, fullgraph=True, backend=counter)
    for num_seqs, lengths in enumerate(LENGTHS, start=2):
        inputs = small_case(lens_q=(lengths * num_seqs)[:num_seqs], is_padded=True).build()
        inputs.call(compiled, inputs.q, inputs.k, inputs.v)
    assert 1 <= counter.frame_count <= 2


def test_two_frames_for_a_growing_cache(fresh_compiler):
    """Decoding: one query, more keys with every step, a mask over all of them."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fa_ops.attention, fullgraph=True, backend=counter)
    for step in range(5):
        case = small_case(
            is_padded=True, lens_q=(1, 1), lens_k=(6 + step, 9 + step), memory="head_major", key_mask="hole"
        )
        inputs = case.build()
        out, _ = inputs.call(compiled, inputs.q, inputs.k, inputs.v)
        assert torch.equal(out, inputs.call(fa_ops.attention, inputs.q, inputs.k, inputs.v)[0])
    assert 1 <= counter.frame_count <= 2


def test_new_values_of_lengths_need_no_new_frame(fresh_compiler):
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fa_ops.attention, fullgraph=True, backend=counter)
    q = torch.randn(12, 2, 16)
    for split in range(2, 11):
        start, length = fa_ops.varlen.from_lengths(torch.tensor([split, 12 - split]))
        assert torch.equal(compiled(q, q, q, start, length), fa_ops.attention(q, q, q, start, length))
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_autocast(backend, fresh_inductor):
    """As Llama's attention calls it: q and k in float32 after the rotary embedding, v in bfloat16."""
    inputs = small_case().build()
    inputs.v, inputs.dout = inputs.v.bfloat16(), inputs.dout.bfloat16()

    def forward(inputs, q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return inputs.call(fa_ops.attention, q, k, v)[:1]

    expected = run(forward, inputs)
    assert [t.dtype for t in expected] == [torch.bfloat16, torch.float32, torch.float32, torch.bfloat16]
    compiled = torch.compile(forward, fullgraph=True, backend=backend)
    torch.testing.assert_close(run(compiled, inputs), expected, rtol=0, atol=0)


def test_a_cache_is_not_copied(fresh_inductor, monkeypatch):
    """The transpose of a (B, H, S, D) cache reaches the CPU op with the cache's own memory, through Inductor too."""
    seen = []

    def record(q, k, v, *args, **kwargs):
        seen.append((k.data_ptr(), v.data_ptr()))
        return flash_forward(q, k, v, *args, **kwargs)

    flash_forward = cpu.flash_forward
    monkeypatch.setattr(cpu, "flash_forward", record)
    cache_k, cache_v = torch.randn(2, 1, 2, 10, 16).unbind(0)
    q, start, length = torch.randn(1, 1, 4, 16), torch.zeros(1, dtype=torch.int32), torch.tensor([10])

    def decode(q, cache_k, cache_v):
        k, v = cache_k.transpose(1, 2), cache_v.transpose(1, 2)
        one = torch.ones_like(length)
        return fa_ops.attention(q, k, v, start, one, b_start_loc_k=start, b_seq_len_k=length)

    with torch.no_grad():
        torch.compile(decode, fullgraph=True)(q, cache_k, cache_v)
    assert seen == [(cache_k.data_ptr(), cache_v.data_ptr())]


def test_gradients_of_only_some_inputs(fresh_compiler):
    inputs = small_case(has_dlse=True).build()
    grads = []
    for attention in (fa_ops.attention, torch.compile(fa_ops.attention, fullgraph=True, backend="aot_eager")):
        v = inputs.v.detach().requires_grad_()
        grads += torch.autograd.grad(inputs.call(attention, inputs.q, inputs.k, v), v, (inputs.dout, inputs.dlse))
    assert torch.equal(*grads)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_key_ranges_that_overlap_stop_the_backward(backend, fresh_inductor):
    """No partition of the graph drops the comparison, or moves it into the forward."""
    q, k, v = (torch.randn(10, 2, 16, requires_grad=True) for _ in range(3))
    start, length = torch.tensor([0, 5]), torch.tensor([5, 5])

    def attend(start_k):
        return fa_ops.attention(q, k, v, start, length, b_start_loc_k=start_k, b_seq_len_k=length)

    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    for f in (compiled, attend):
        f(start.clone()).sum().backward()
        out = f(torch.tensor([0, 4]))
        with pytest.raises(ValueError, match=r"^b_start_loc_k, b_seq_len_k: ranges given that overlap"):
            out.sum().backward()
    with torch.no_grad():
        assert torch.equal(compiled(torch.tensor([0, 4])), attend(torch.tensor([0, 4])))


def test_a_wrong_compiled_function_is_noticed(fresh_compiler):
    inputs = small_case(has_dlse=True).build()

    def wrong(inputs, q, k, v):
        return attend(inputs, q, k, pad(v[1:], (0, 0, 0, 0, 0, 1)))

    with pytest.raises(AssertionError):
        check_equals_eager(inputs, torch.compile(wrong, fullgraph=True, backend="eager"))

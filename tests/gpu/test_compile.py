"""torch.compile, torch.export and CUDA graphs over the kernels."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend
from torch._inductor.utils import fresh_cache

import fa_ops
from tests.compile.test_compile import CASES, LENGTHS, attend, check_equals_eager, run
from tests.compile.test_export import Packed, Padded, export, run_elsewhere, tensors_of
from tests.compile.test_opcheck import BACKWARD, BACKWARD_VARIANTS, FORWARD, UTILITIES, VARIANTS, backward_arguments
from tests.support.problems import op_arguments, small_case

pytestmark = pytest.mark.gpu


@pytest.fixture
def fresh_inductor(fresh_compiler, tmp_path):
    """An empty compile cache: a stale one turns failures green."""
    with fresh_cache(dir=str(tmp_path)):
        yield


@pytest.fixture
def no_synchronisation():
    """Whoever waits for the device raises."""

    def forbid(is_forbidden: bool) -> None:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if is_forbidden else "default")

    yield forbid
    torch.cuda.set_sync_debug_mode("default")


def on_cuda(tensors: tuple) -> tuple:
    return tuple(t.cuda() if isinstance(t, Tensor) else t for t in tensors)


def problem(lens: tuple[int, ...], **changes):
    return small_case(**{"lens_q": lens, "dtype": torch.bfloat16, "head_dim": 64, "value_dim": 64} | changes).build(
        "cuda"
    )


@pytest.mark.parametrize("case", VARIANTS.values(), ids=VARIANTS.keys())
def test_opcheck_forward(case):
    arguments = op_arguments(case.build("cuda"))
    for t in arguments:
        if isinstance(t, Tensor) and t.is_floating_point():
            t.requires_grad_()
    torch.library.opcheck(FORWARD, arguments, test_utils=UTILITIES)


@pytest.mark.parametrize("case", BACKWARD_VARIANTS.values(), ids=BACKWARD_VARIANTS.keys())
def test_opcheck_backward(case):
    torch.library.opcheck(BACKWARD, backward_arguments(case.build("cuda")), test_utils=UTILITIES)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_equals_eager(case, backend, fresh_inductor):
    check_equals_eager(case.build("cuda"), torch.compile(attend, fullgraph=True, backend=backend))


@pytest.mark.parametrize("is_padded", [False, True], ids=["packed", "padded"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_equals_eager_at_usual_sizes(dtype, is_padded, fresh_inductor):
    compiled = torch.compile(attend, fullgraph=True)
    for lens in ((700, 129, 1024), (64, 1, 333)):
        check_equals_eager(problem(lens, dtype=dtype, is_padded=is_padded, head_dim=128, has_dlse=True), compiled)


@pytest.mark.parametrize("is_padded", [False, True], ids=["packed", "padded"])
def test_two_frames_for_five_lengths(is_padded, fresh_inductor):
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(fa_ops.attention, fullgraph=True, backend=counter)
    for lens in LENGTHS:
        inputs = problem(lens, is_padded=is_padded, max_input_len="exact")
        q, k, v = (t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
        out, _ = inputs.call(compiled, q, k, v)
        assert torch.equal(out, inputs.call(fa_ops.attention, q, k, v)[0])
        out.backward(inputs.dout)
    assert 1 <= counter.frame_count <= 2


def test_aot_autograd_sees_the_kernels(fresh_compiler):
    backend = AotEagerAndRecordGraphs()
    inputs = problem((40, 30), dtype=torch.float32)  # no kernel of an architecture's own knows it
    tensors = [t.detach().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]
    compiled = torch.compile(fa_ops.attention, fullgraph=True, backend=backend)
    compiled(*tensors, inputs.b_start_loc, inputs.b_seq_len).sum().backward()
    launch = torch.ops.higher_order.triton_kernel_wrapper_functional
    written = [
        [node.kwargs["tensors_to_clone"] for node in graph.graph.nodes if node.target is launch]
        for graph in (backend.fw_graphs[0], backend.bw_graphs[0])
    ]
    assert written == [[["out_ptr", "lse_ptr"]], [["delta_ptr", "dq_ptr"], ["dk_ptr", "dv_ptr"]]]


class TestCudaGraphs:
    """Replays with new contents of the same tensors, lengths among them."""

    LENGTHS = ((20, 44), (44, 20), (64, 0), (1, 63), (30, 30))

    @pytest.mark.parametrize("is_padded", [False, True], ids=["packed", "padded"])
    def test_reduce_overhead(self, is_padded, fresh_inductor):
        compiled = torch.compile(attend, fullgraph=True, mode="reduce-overhead")
        inputs = problem((64, 64) if is_padded else (20, 44), is_padded=is_padded)
        before = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
        for lens in self.LENGTHS:
            start, length = torch.zeros(2, dtype=torch.int32), torch.tensor(lens, dtype=torch.int32)
            inputs.b_start_loc = start.cuda() if is_padded else (length.cumsum(0, dtype=torch.int32) - length).cuda()
            inputs.b_seq_len = length.cuda()
            inputs.q = torch.randn_like(inputs.q)
            torch.compiler.cudagraph_mark_step_begin()
            found = [t.clone() for t in run(compiled, inputs)]
            torch.testing.assert_close(found, list(run(attend, inputs)), rtol=0, atol=0)
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == before

    @pytest.mark.parametrize("is_padded", [False, True], ids=["packed", "padded"])
    def test_capture_and_replay(self, is_padded):
        inputs = problem((64, 64) if is_padded else (20, 44), is_padded=is_padded)
        q, k, v = (t.detach().clone().requires_grad_() for t in (inputs.q, inputs.k, inputs.v))
        start, length = inputs.b_start_loc.clone(), inputs.b_seq_len.clone()

        def step() -> tuple[Tensor, ...]:
            out, lse = fa_ops.attention(q, k, v, start, length, return_lse=True)
            return out, lse, *torch.autograd.grad(out, (q, k, v), inputs.dout)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        for lens in self.LENGTHS:
            length.copy_(torch.tensor(lens))
            start.copy_(torch.tensor([0, 0 if is_padded else lens[0]]))
            with torch.no_grad():
                q.normal_()
            graph.replay()
            for found, expected in zip(captured, step(), strict=True):
                assert torch.equal(found, expected)


class TestSynchronisation:
    @pytest.mark.parametrize("key_mask", [None, "random"], ids=["", "key_mask"])
    @pytest.mark.parametrize("is_padded", [False, True], ids=["packed", "padded"])
    def test_eager(self, is_padded, key_mask, no_synchronisation):
        inputs = problem((40, 30), is_padded=is_padded, key_mask=key_mask if is_padded else None, has_dlse=True)
        run(attend, inputs)
        no_synchronisation(True)
        run(attend, inputs)
        no_synchronisation(False)

    @pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
    def test_compiled(self, mode, no_synchronisation, fresh_inductor):
        inputs = problem((40, 30), has_dlse=True)
        compiled = torch.compile(attend, fullgraph=True, mode=mode)
        for _ in range(3):
            torch.compiler.cudagraph_mark_step_begin()
            run(compiled, inputs)
        no_synchronisation(True)
        torch.compiler.cudagraph_mark_step_begin()
        run(compiled, inputs)
        no_synchronisation(False)

    def test_varlen(self, no_synchronisation):
        cu_seqlens = torch.tensor([0, 3, 9], device="cuda")
        mask = torch.ones(2, 9, dtype=torch.bool, device="cuda")
        no_synchronisation(True)
        fa_ops.varlen.from_cu_seqlens(cu_seqlens)
        fa_ops.varlen.from_lengths(cu_seqlens)
        fa_ops.varlen.from_mask(mask)
        no_synchronisation(False)

    def test_would_be_noticed(self, no_synchronisation):
        length = torch.tensor([3], device="cuda")
        no_synchronisation(True)
        with pytest.raises(RuntimeError, match="synchronizing"):
            length.item()


class TestExport:
    @pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
    @pytest.mark.parametrize("is_padded", [False, True], ids=["packed", "padded"])
    def test_dynamic_shapes(self, is_padded, strict, fresh_compiler):
        program, eager = export(is_padded, strict, "cuda").module(), Padded() if is_padded else Packed()
        for lens in LENGTHS:
            tensors = on_cuda(tensors_of(lens, is_padded))
            for found, expected in zip(program(*tensors), eager(*tensors), strict=True):
                assert torch.equal(found, expected)

    def test_saved_program_runs_in_another_process(self, tmp_path, fresh_compiler):
        tensors = [on_cuda(tensors_of(lens, True)) for lens in LENGTHS]
        for found, arguments in zip(run_elsewhere(export(True, True, "cuda"), tensors, tmp_path), tensors, strict=True):
            for one, expected in zip(found, Padded()(*arguments), strict=True):
                assert torch.equal(one, expected)


def test_a_side_stream(fresh_inductor):
    inputs = problem((400, 300))
    expected = run(attend, inputs)
    compiled = torch.compile(attend, fullgraph=True)
    stream = torch.cuda.Stream()
    for forward in (attend, compiled):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = run(forward, inputs)
        torch.cuda.current_stream().wait_stream(stream)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)

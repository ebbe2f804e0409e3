"""torch's context parallelism replaces SDPA alone: the adapter has to refuse to run inside it."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing

from fa_ops.integrations.context_parallel import refuse_context_parallel

WORLD_SIZE = 2
MESSAGE = r"^GptModel: called inside torch's context_parallel"


def attend(t: torch.Tensor) -> torch.Tensor:
    refuse_context_parallel("GptModel")
    return t + 1


def check_refused(call) -> None:
    with pytest.raises(NotImplementedError, match=MESSAGE):
        call(torch.ones(2))


def check_both_forms() -> None:
    """Runs in each process."""
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.tensor.experimental import _attention, context_parallel

    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    compiled = torch.compile(attend, backend="eager")
    for call in (attend, compiled):
        call(torch.ones(2))
        tokens = torch.arange(8.0)
        with context_parallel(mesh, buffers=[tokens], buffer_seq_dims=[0]):
            assert len(tokens) == 8 // WORLD_SIZE
            check_refused(call)
        call(torch.ones(2))
        _attention._enable_context_parallel_dispatcher()
        check_refused(call)
        _attention._disable_context_parallel_dispatcher()
        call(torch.ones(2))


def run_process(process: int, store: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=process, world_size=WORLD_SIZE)
    check_both_forms()
    torch.distributed.destroy_process_group()


def test_two_processes_are_refused_inside_and_run_outside(tmp_path: Path):
    torch.multiprocessing.spawn(run_process, (str(tmp_path / "store"),), nprocs=WORLD_SIZE)


def test_a_whole_graph_is_traced(fresh_compiler):
    assert torch.equal(torch.compile(attend, backend="eager", fullgraph=True)(torch.ones(2)), torch.full((2,), 2.0))

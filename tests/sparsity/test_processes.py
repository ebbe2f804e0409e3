"""Sparse models in two processes: DDP, FSDP2 and tensor parallelism give what one process gives."""

import multiprocessing
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import fa_ops.sparsity as mtsa
from tests.sparsity.models import config_of, logits, sharp_model, tokens

WORLD_SIZE = 2
CONFIG = config_of(backend="triton", collect_stats=True)
OF_HEADS = {"prefill": [0.1, 0.2, 0.5, 0.7]}


def counts_of(model) -> torch.Tensor:
    return torch.stack(list(mtsa.block_counts(model).values()))


def check_ddp(rank: int) -> None:
    """Each process counts its own data, and two forwards may come before a backward."""
    model, ids = mtsa.sparsify(sharp_model(), CONFIG), tokens(100, rows=4)[2 * rank : 2 * rank + 2]
    with torch.no_grad(), mtsa.collect_stats(model):
        model(ids)
    once = counts_of(model)
    assert 0 < mtsa.dropped_share(model, "prefill") < 0.95
    every = [torch.empty_like(once) for _ in range(WORLD_SIZE)]
    torch.distributed.all_gather(every, once)
    assert not torch.equal(*every)

    wrapped = DistributedDataParallel(model)
    (wrapped(input_ids=ids, labels=ids).loss + wrapped(input_ids=ids.flip(1), labels=ids).loss).backward()
    with mtsa.collect_stats(model):
        for _ in range(2):
            wrapped(input_ids=ids, labels=ids).loss.backward()
    assert torch.equal(counts_of(model), 2 * once)
    assert list(mtsa.block_counts(wrapped)) == list(mtsa.block_counts(model))
    mtsa.remove_sparse_attention(wrapped)
    assert not mtsa.is_attn_sparsified(model)


def check_fsdp(rank: int) -> None:
    """Made on the meta device, sharded, emptied and loaded, as large models are."""
    expected, ids = mtsa.sparsify(sharp_model(), CONFIG), tokens()
    wanted = logits(expected, ids)
    whole, model = sharp_model(), sharp_model().to("meta")
    mtsa.sparsify(model, CONFIG)
    for layer in model.model.layers:
        fully_shard(layer.self_attn)
        fully_shard(layer)
    fully_shard(model)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            full = whole.get_parameter(name)
            parameter.copy_(distribute_tensor(full, parameter.device_mesh, parameter.placements))
        for name, buffer in whole.named_buffers():
            model.get_buffer(name).copy_(buffer)
    torch.testing.assert_close(logits(model, ids), wanted)
    assert torch.equal(counts_of(model), counts_of(expected))
    assert mtsa.export_sparse_attention_config(model) == mtsa.export_sparse_attention_config(expected)


def check_tensor_parallel(rank: int, is_sparse_first: bool) -> None:
    """Each process has half of the heads, counts them, and has one λ for all of them."""
    expected, model, ids = sharp_model(), sharp_model(), tokens()
    plan = {"self_attn.o_proj": RowwiseParallel()}
    plan |= {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    mtsa.sparsify(expected, CONFIG)
    if is_sparse_first:
        mtsa.sparsify(model, CONFIG)
    for layer in model.model.layers:
        parallelize_module(layer, mesh, plan)
    if not is_sparse_first:
        mtsa.sparsify(model, CONFIG)
    torch.testing.assert_close(logits(model, ids), logits(expected, ids), atol=1e-4, rtol=1e-4)
    assert 0 < mtsa.dropped_share(model, "prefill") < 0.95
    heads = slice(2 * rank, 2 * rank + 2)
    assert torch.equal(counts_of(model), counts_of(expected)[..., heads])
    mtsa.set_thresholds(model, OF_HEADS)
    with pytest.raises(ValueError, match=r"thresholds\['prefill'\]: one number for each of 4 heads given; q has 2"):
        logits(model, ids)
    with pytest.raises(ValueError, match="calibration: q has 2 of 4 heads, as under tensor parallelism"):
        mtsa.calibrate(model, {}, lambda m: m(ids))


CHECKS = {
    "ddp": (check_ddp,),
    "fsdp": (check_fsdp,),
    "sparse, then tensor parallel": (check_tensor_parallel, True),
    "tensor parallel, then sparse": (check_tensor_parallel, False),
}


def run_process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD_SIZE)
    for name, (check, *arguments) in CHECKS.items():
        torch.manual_seed(0)
        try:
            check(rank, *arguments)
            text = ""
        except Exception:
            text = traceback.format_exc()
        Path(folder, f"{name} {rank}").write_text(text)
        torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> Path:
    """A folder with what went wrong, by check and process. The processes share one import of everything."""
    folder = tmp_path_factory.mktemp("reports")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    processes = [context.Process(target=run_process, args=(rank, str(folder))) for rank in range(WORLD_SIZE)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    return folder


@pytest.mark.parametrize("name", CHECKS)
def test_two_processes_are_what_one_is(reports, name):
    for rank in range(WORLD_SIZE):
        report = reports / f"{name} {rank}"
        assert report.exists(), f"process {rank} did not get so far"
        assert not report.read_text(), report.read_text()

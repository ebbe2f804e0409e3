"""DTensor: two processes compute what one does, and what is sharded stays sharded on its heads."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing

import fa_ops

WORLD_SIZE = 2
HEADS = 6


def packed(heads_kv: int) -> tuple[list[torch.Tensor], dict]:
    """q, k and v; and the arguments that are replicated."""
    qkv = [torch.randn(9, HEADS, 16), torch.randn(9, heads_kv, 16), torch.randn(9, heads_kv, 32)]
    return qkv, {"b_start_loc": torch.tensor([0, 4]), "b_seq_len": torch.tensor([4, 3])}


def packed_with_other_keys(heads_kv: int) -> tuple[list[torch.Tensor], dict]:
    qkv, others = packed(heads_kv)
    return qkv, others | {"b_start_loc_k": torch.tensor([5, 0]), "b_seq_len_k": torch.tensor([4, 5])}


def padded(heads_kv: int) -> tuple[list[torch.Tensor], dict]:
    qkv = [torch.randn(2, 4, HEADS, 16), torch.randn(2, 7, heads_kv, 16), torch.randn(2, 7, heads_kv, 16)]
    key_mask = torch.ones(2, 7, dtype=torch.bool)
    key_mask[0, 2] = False
    queries = {"b_start_loc": torch.tensor([0, 1]), "b_seq_len": torch.tensor([4, 3])}
    return qkv, queries | {
        "b_start_loc_k": torch.tensor([0, 2]), "b_seq_len_k": torch.tensor([7, 5]), "key_mask": key_mask,
    }  # fmt: skip


def paged_cache() -> tuple[list[torch.Tensor], dict]:
    qkv = [torch.randn(5, HEADS, 16), torch.randn(4, 3, 2, 16), torch.randn(4, 3, 2, 16)]
    return qkv, {
        "b_start_loc": torch.tensor([0, 2]), "b_seq_len": torch.tensor([2, 3]), "b_seq_len_k": torch.tensor([7, 4]),
        "block_table": torch.tensor([[3, 0, 1], [2, 3, 0]]),
    }  # fmt: skip


def check_paged_cache_sharded() -> None:
    """Runs in each process: heads of q are dimension 1, those of the cache dimension 2."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    qkv, others = paged_cache()
    expected = torch.ops.modelopt.varlen_attention(*qkv, **others)
    found = torch.ops.modelopt.varlen_attention(
        *(distribute_tensor(t, mesh, [Shard(t.dim() - 2)]) for t in qkv),
        **{name: distribute_tensor(t, mesh, [Replicate()]) for name, t in others.items()},
    )
    assert [t.placements for t in found[:2]] == [(Shard(1),), (Shard(0),)]
    for one, want in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(one.full_tensor(), want)


def attend(qkv: list[torch.Tensor], sinks: torch.Tensor | None, others: dict, losses: str) -> dict[str, torch.Tensor]:
    """Outputs and gradients; `losses` names the outputs that have one."""
    floats = [*qkv] if sinks is None else [*qkv, sinks]
    for t in floats:
        t.requires_grad_()
    out, lse = fa_ops.attention(*qkv, **others, sinks=sinks, return_lse=True)
    sums = {"out": out.square().sum(), "lse": lse.clamp(min=-1e3).square().sum()}
    sum(sums[name] for name in losses.split()).backward()
    grads = {f"d{name}": t.grad for name, t in zip(("q", "k", "v", "sinks"), floats, strict=False)}
    return {"out": out, "lse": lse} | grads


def check_sharded(make, heads_kv: int, given: str, accepted: str, losses: str, has_sinks: bool) -> None:
    """Runs in each process. `given` and `accepted` are of heads, tokens, replicated; `accepted` may name two."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD_SIZE,))
    qkv, others = make(heads_kv)
    sinks = torch.randn(HEADS) if has_sinks else None
    expected = attend([t.clone() for t in qkv], None if sinks is None else sinks.clone(), others, losses)

    rank = qkv[0].dim()
    placement = {"heads": Shard(rank - 2), "tokens": Shard(rank - 3), "replicated": Replicate()}
    actual = attend(
        [distribute_tensor(t, mesh, [placement[given]]) for t in qkv],
        None if sinks is None else distribute_tensor(sinks, mesh, [Shard(0) if given == "heads" else Replicate()]),
        {name: distribute_tensor(t, mesh, [Replicate()]) for name, t in others.items()},
        losses,
    )
    sharded = dict.fromkeys(actual, (placement["heads"],)) | {"lse": (Shard(rank - 3),)}
    if has_sinks:
        sharded["dsinks"] = (Shard(0),)
    wanted = {"heads": sharded, "replicated": dict.fromkeys(actual, (Replicate(),))}
    placements = {name: t.placements for name, t in actual.items()}
    assert placements in [wanted[name] for name in accepted.split()], placements
    for name, want in expected.items():
        torch.testing.assert_close(actual[name].full_tensor(), want, msg=lambda text, name=name: f"{name}: {text}")


CASES = [
    (packed, 2, "heads", "heads", "out lse", True),
    (padded, 2, "heads", "heads", "out lse", True),
    (packed, 6, "heads", "heads", "out", False),
    (padded, 6, "heads", "heads", "lse", False),
    (packed, 2, "replicated", "replicated", "out lse", True),
    (padded, 2, "replicated", "replicated", "out", False),
    (packed_with_other_keys, 2, "heads", "heads", "out lse", True),
    (packed_with_other_keys, 2, "replicated", "replicated", "lse", False),
    (packed_with_other_keys, 2, "tokens", "heads replicated", "out", False),
    # key heads that do not divide among two processes
    (packed, 3, "heads", "replicated", "out lse", True),
    (padded, 3, "tokens", "replicated", "out lse", True),
    (packed, 1, "replicated", "replicated", "lse", False),
    (packed, 2, "tokens", "heads replicated", "out lse", False),
    (padded, 2, "tokens", "heads replicated", "out lse", True),
]


def run_process(process: int, store: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=process, world_size=WORLD_SIZE)
    for seed, case in enumerate(CASES):
        torch.manual_seed(seed)
        try:
            check_sharded(*case)
        except Exception as error:
            raise AssertionError(f"case {case}") from error
    check_paged_cache_sharded()
    torch.distributed.destroy_process_group()


def test_two_processes_compute_what_one_does(tmp_path: Path):
    torch.multiprocessing.spawn(run_process, (str(tmp_path / "store"),), nprocs=WORLD_SIZE)


@pytest.mark.parametrize(
    ("heads", "mesh_shape", "expected"),
    [
        (8, (4,), True),
        (8, (2, 4), True),
        (2, (4, 2), True),  # over four or eight there are fewer heads than shards, which DTensor itself leaves out
        (6, (4,), False),
        (6, (2, 2), False),  # 3 heads and 3, then 2, 1, 2, 1
        (6, (2, 3), True),
        (1, (1,), True),
    ],
)
def test_heads_are_sharded_only_where_every_combination_of_mesh_dimensions_is_even(heads, mesh_shape, expected):
    from fa_ops_meta.sharding import _shards_evenly

    assert _shards_evenly(heads, mesh_shape) is expected

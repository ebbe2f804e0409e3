"""torch.export: dynamic shapes, and a saved program that another process loads and runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fa_ops
from fa_ops.reference import attention_reference
from tests.support.problems import small_case

ROOT = Path(__file__).parents[2]
LOAD_AND_RUN = """
import sys, torch, fa_ops
program, tensors, results = sys.argv[1:]
exported = torch.export.load(program)
torch.save([exported.module()(*t) for t in torch.load(tensors, weights_only=True)], results)
"""


class Packed(torch.nn.Module):
    def forward(self, q, k, v, b_start_loc, b_seq_len):
        return fa_ops.attention(q, k, v, b_start_loc, b_seq_len, return_lse=True)


class Padded(torch.nn.Module):
    def forward(self, q, k, v, b_start_loc, b_seq_len, key_mask):
        return fa_ops.attention(q, k, v, b_start_loc, b_seq_len, key_mask=key_mask, return_lse=True)


def tensors_of(lens: tuple[int, ...], is_padded: bool) -> tuple[torch.Tensor, ...]:
    inputs = small_case(lens_q=lens, is_padded=is_padded, key_mask="random" if is_padded else None).build()
    tensors = (inputs.q, inputs.k, inputs.v, inputs.b_start_loc, inputs.b_seq_len)
    return (*tensors, inputs.key_mask) if is_padded else tensors


def export(is_padded: bool, strict: bool, device: str = "cpu") -> torch.export.ExportedProgram:
    seqs, rows = torch.export.Dim("seqs", min=2), torch.export.Dim("rows", min=2)
    shape = {0: seqs, 1: rows} if is_padded else {0: rows}
    index = {0: seqs}
    shapes = (shape, shape, shape, index, index, shape) if is_padded else (shape, shape, shape, index, index)
    module = Padded() if is_padded else Packed()
    tensors = tuple(t.to(device) for t in tensors_of((5, 7), is_padded))
    return torch.export.export(module, tensors, dynamic_shapes=shapes, strict=strict)


def run_elsewhere(exported: torch.export.ExportedProgram, tensors: list, folder: Path) -> list:
    """Saves the program; another process loads it and runs it on each entry of `tensors`."""
    program, arguments, results = (str(folder / name) for name in ("program.pt2", "tensors.pt", "results.pt"))
    torch.export.save(exported, program)
    torch.save(tensors, arguments)
    command = [sys.executable, "-c", LOAD_AND_RUN, program, arguments, results]
    run = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return torch.load(results, weights_only=True)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
@pytest.mark.parametrize("is_padded", [False, True], ids=["packed", "padded"])
def test_dynamic_shapes(is_padded, strict, fresh_compiler):
    program = export(is_padded, strict).module()
    eager = Padded() if is_padded else Packed()
    for lens in ((5, 7), (2, 3, 11), (1, 20, 0, 4)):
        tensors = tensors_of(lens, is_padded)
        for found, expected in zip(program(*tensors), eager(*tensors), strict=True):
            assert torch.equal(found, expected)


def test_saved_program_runs_in_another_process(tmp_path, fresh_compiler):
    tensors = [tensors_of(lens, True) for lens in ((5, 7), (2, 3, 11))]
    for found, arguments in zip(run_elsewhere(export(True, True), tensors, tmp_path), tensors, strict=True):
        for one, expected in zip(found, Padded()(*arguments), strict=True):
            assert torch.equal(one, expected)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non_strict"])
def test_saved_packed_program_runs_in_another_process(strict, tmp_path, fresh_compiler):
    tensors = [tensors_of(lens, False) for lens in ((5, 7), (2, 3, 11))]
    for found, arguments in zip(run_elsewhere(export(False, strict), tensors, tmp_path), tensors, strict=True):
        for one, expected in zip(found, Packed()(*arguments), strict=True):
            assert torch.equal(one, expected)


def test_decomposed_program_gives_the_same_numbers(fresh_compiler):
    tensors = tensors_of((5, 7), False)
    found = export(False, True).run_decompositions().module()(*tensors)
    assert torch.equal(found[0], Packed()(*tensors)[0])
    torch.testing.assert_close(found[0], attention_reference(*tensors))


def test_training_program_differentiates(fresh_compiler):
    program = export(False, True).module()
    q, *others = tensors_of((4, 9), False)
    found, expected = (torch.autograd.grad(f(q.requires_grad_(), *others)[0].sum(), q) for f in (program, Packed()))
    assert torch.equal(*found, *expected)


@pytest.mark.slow
def test_compiled_ahead_of_time(tmp_path, fresh_inductor):
    path = torch._inductor.aoti_compile_and_package(export(True, True), package_path=str(tmp_path / "model.pt2"))
    program = torch._inductor.aoti_load_package(path)
    for lens in ((5, 7), (2, 3, 11)):
        tensors = tensors_of(lens, True)
        for found, expected in zip(program(*tensors), Padded()(*tensors), strict=True):
            assert torch.equal(found, expected)

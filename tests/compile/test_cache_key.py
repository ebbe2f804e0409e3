"""AOTAutograd's cache key holds the source of every kernel: an edited kernel must not find the old one's entry."""

import re
from importlib import import_module
from pkgutil import iter_modules

import pytest
import torch
import triton
from torch._dynamo.testing import EagerAndRecordGraphs
from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCacheDetails
from torch._library.triton import get_triton_kernels_for_op

import fa_ops.kernels
from fa_ops.kernels import primitives
from tests.support.problems import small_case

# modules of kernels that compiled programs do not hold: those behind opaque ops, and calibration's
OPAQUE = ("backward_tiles", "counting", "hopper", "hopper_backward", "hopper_sparse", "tiles")


def jit_functions() -> list[triton.JITFunction]:
    """Every kernel and every helper function of fa_ops.kernels that compiled programs hold."""
    names = [module.name for module in iter_modules(fa_ops.kernels.__path__) if module.name not in OPAQUE]
    modules = [import_module(f"fa_ops.kernels.{name}") for name in names]
    functions = {x for module in modules for x in vars(module).values() if isinstance(x, triton.JITFunction)}
    return sorted(functions, key=lambda function: function.__name__)


@pytest.fixture
def cached_source(fresh_compiler) -> str:
    """What the cache key of a compiled call of fa_ops.attention holds of Triton kernels."""
    backend, inputs = EagerAndRecordGraphs(), small_case().build()
    inputs.call(torch.compile(fa_ops.attention, fullgraph=True, backend=backend), inputs.q, inputs.k, inputs.v)
    details = AOTAutogradCacheDetails.__new__(AOTAutogradCacheDetails)
    return "\n".join(details.get_triton_source_codes_from_gm(backend.graphs[0]))


@pytest.mark.parametrize(
    ("op", "kernels"),
    [
        (
            "varlen_attention",
            {
                "attention_forward_kernel",
                "attention_decode_kernel",
                "attention_combine_kernel",
                "attention_backward_dq_kernel",
                "attention_backward_dkv_kernel",
                "tile_list_kernel",  # for the opaque ops of sm_90
                "backward_tiles_kernel",
            },
        ),
        (
            "varlen_attention_backward",
            {"attention_backward_dq_kernel", "attention_backward_dkv_kernel", "backward_tiles_kernel"},
        ),
    ],
)
def test_kernels_of_the_op(op, kernels):
    """The forward op answers for the backward's kernels too: it is alone in the graph that the key is made of."""
    assert {kernel.__name__ for kernel in get_triton_kernels_for_op(f"modelopt::{op}")} == kernels


@pytest.mark.parametrize("function", jit_functions(), ids=lambda fn: fn.__name__)
def test_holds_the_source(function, cached_source):
    body = function.src[function.src.index("def ") :].strip()
    assert body in cached_source


def test_holds_the_constants(cached_source):
    constants = {name: x.value for name, x in vars(primitives).items() if isinstance(x, triton.language.constexpr)}
    assert constants
    for name, value in constants.items():
        assert re.search(rf"^{name} = .*{re.escape(repr(value))}", cached_source, re.MULTILINE), name

"""Launches that pass Triton's own binding of arguments by run the very kernel that it would have run."""

import itertools
from typing import ClassVar

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
from triton.backends.compiler import GPUTarget  # noqa: E402

from fa_ops import launching  # noqa: E402


@triton.jit(do_not_specialize=("num_seqs",))
def kernel(
    q_ptr, lse_ptr, softmax_scale, num_seqs, stride_qt, stride_qh,
    HEAD_DIM: tl.constexpr, IS_PACKED: tl.constexpr,  # noqa: N803
):  # fmt: skip
    pass


class Driver:
    """Of a GPU that is not there."""

    device = 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiled:
    """A compiled kernel, as far as launches go."""

    function = packed_metadata = None
    hooks: ClassVar[list] = []

    def __init__(self, key: str, launches: list) -> None:
        self.key, self.launches = key, launches

    def launch_metadata(self, *args):
        return None

    def run(self, grid_0, grid_1, grid_2, stream, function, metadata, launch_metadata, enter, exit, *args) -> None:
        self.hooks.append((enter, exit))
        self.launches.append((self.key, (grid_0, grid_1, grid_2), args))

    __getitem__ = triton.compiler.CompiledKernel.__getitem__

    def _init_handles(self) -> None:
        pass


@pytest.fixture
def launches(monkeypatch) -> list:
    """What was launched: Triton's key of the kernel, grid, arguments."""
    taken: list = []

    def compile(self, key, *args, **kwargs):
        return self.device_caches[Driver.device][0].setdefault(key, Compiled(key, taken))

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    monkeypatch.setattr(triton.JITFunction, "_do_compile", compile)
    monkeypatch.setattr(kernel, "device_caches", type(kernel.device_caches)(kernel.create_binder))
    launching._launches_of.cache_clear()
    yield taken
    launching._launches_of.cache_clear()


MEMORY = torch.zeros(64, dtype=torch.float32)
AXES = {
    "q": (MEMORY[:8], MEMORY[1:9], MEMORY[:8].bfloat16()),
    "lse": (MEMORY[16:], MEMORY[17:]),
    "softmax_scale": (0.5, 1.0),
    "num_seqs": (1, 2, 16, 2**31 - 1, 2**31),
    "stride_qt": (1, 3, 16, 2**31, 2**40),
    "stride_qh": (64, 65),
    "HEAD_DIM": (64, 128),
    "num_warps": (4, 8),
}


def addressed(args: tuple) -> list:
    """What the launcher makes of tensors."""
    return [x.data_ptr() if isinstance(x, torch.Tensor) else x for x in args]


def test_it_is_the_kernel_that_triton_would_run(launches):
    first = {name: values[0] for name, values in AXES.items()}
    calls = [first | {name: value} for name, values in AXES.items() for value in values]
    every_41st = itertools.islice(itertools.product(*AXES.values()), 0, None, 41)
    calls += [dict(zip(AXES, values, strict=True)) for values in every_41st]
    for call in calls:
        args = [call[name] for name in list(AXES)[:6]]
        constants = {"IS_PACKED": True, "HEAD_DIM": call["HEAD_DIM"], "num_warps": call["num_warps"]}
        kernel[2, 3](*args, **constants)
        for _ in range(2):
            launching.launch_compiled(kernel, (2, 3), args, constants)
        expected, compiling, found = launches[-3:]
        assert expected[0] == compiling[0] == found[0]
        assert expected[1][:2] == found[1][:2] == (2, 3)
        assert addressed(expected[2]) == addressed(compiling[2]) == addressed(found[2])
    assert len({key for key, _, _ in launches}) > 20


def test_a_launch_asks_for_types_and_alignment_each_time(launches):
    """From call to call pointers and floats may change: addresses, whether they are multiples of 16, dtypes."""
    constants = {"IS_PACKED": True, "HEAD_DIM": 64, "num_warps": 4}
    launch = launching.Launch(kernel, (2, 3), constants)
    for _ in range(2):
        for q, lse, scale in itertools.product(AXES["q"], AXES["lse"], AXES["softmax_scale"]):
            args = (q, lse, scale, 2, 16, 64)
            kernel[2, 3](*args, **constants)
            launch(*args)
            expected, found = launches[-2:]
            assert expected[:2] == (found[0], (*found[1][:2], expected[1][2]))
            assert addressed(expected[2]) == addressed(found[2])
    assert len({key for key, _, _ in launches}) == 6
    assert len(launch.compiled) == 2


def test_profilers_hear_of_launches(launches, monkeypatch):
    heard: list = []
    for name in ("launch_enter_hook", "launch_exit_hook"):
        hooks = getattr(triton.knobs.runtime, name)
        args = (MEMORY, MEMORY, 0.5, 2, 64, 64)
        constants = {"IS_PACKED": True, "HEAD_DIM": 64}
        launch = launching.Launch(kernel, (1,), constants)
        for is_heard in (False, True, False):
            if is_heard:
                hooks.add(heard.append)
            launch(*args)
            launch(*args)
            hooks.remove(heard.append)
            assert (hooks in Compiled.hooks[-1]) is is_heard


def test_answers_are_remembered_for_a_kind_of_call_only(monkeypatch):
    asked: list = []

    def ask(*args):
        asked.append(args)
        if args[-1] == "wrong":
            raise ValueError(args)
        return len(asked)

    ask = launching.remember(ask)
    meta = torch.empty(8, device="meta")
    kinds = [
        (MEMORY[:8], None, 1.0), (MEMORY[:8], None, 2.0), (MEMORY[:8], MEMORY[:8], 1.0), (MEMORY[8:16], None, 1.0),
        (MEMORY[:7], None, 1.0), (MEMORY[:16:2], None, 1.0), (MEMORY[:8].bfloat16(), None, 1.0), (meta, None, 1.0),
        (MEMORY[:8].view(2, 4), None, 1.0), (MEMORY[:8].view(torch.int32), None, 1.0),
    ]  # fmt: skip
    first = [ask(*kind) for kind in kinds]
    assert first == [ask(*kind) for kind in kinds] == list(range(1, len(kinds) + 1))
    assert ask(torch.ones(8), None, 1.0) == 1
    for _ in range(2):
        with pytest.raises(ValueError, match="wrong"):
            ask(MEMORY, "wrong")
    assert len(asked) == len(kinds) + 2
    sparse = torch.eye(3).to_sparse()
    assert ask(sparse) + 1 == ask(sparse), "it has no strides to tell kinds by"
    monkeypatch.setattr(launching, "MAX_COMPILED", 1)
    assert ask(*kinds[0]) == 1
    assert ask(MEMORY) == ask(MEMORY)
    assert ask(*kinds[0]) != 1


def test_calls_of_many_kinds_do_not_fill_the_memory(launches, monkeypatch):
    monkeypatch.setattr(launching, "MAX_COMPILED", 4)
    for stride in range(100, 120):
        args = (MEMORY, MEMORY, 0.5, 2, stride, 64)
        launching.launch_compiled(kernel, (1,), args, {"IS_PACKED": True, "HEAD_DIM": 64})
    assert len(launching._launches_of(kernel).compiled) <= 4
    assert len(launches) == 20


def test_hooks_before_triton_looks_at_arguments_are_called(launches, monkeypatch):
    args = (MEMORY, MEMORY, 0.5, 2, 64, 64)
    called: list = []
    for _ in range(3):
        launching.launch_compiled(kernel, (1,), args, {"IS_PACKED": True, "HEAD_DIM": 64})
    monkeypatch.setattr(kernel, "pre_run_hooks", [lambda *args, **kwargs: called.append(args)])
    launching.launch_compiled(kernel, (1,), args, {"IS_PACKED": True, "HEAD_DIM": 64})
    assert called == [args]

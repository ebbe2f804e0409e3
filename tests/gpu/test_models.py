"""Models on a GPU: they never wait for the device, copy no cache, compile few frames, and are accurate in bfloat16."""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_cache
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel, StaticCache
from transformers.masking_utils import causal_mask_function

from fa_ops.integrations.huggingface import ATTENTION_NAME, triton_attention_forward
from fa_ops.integrations.huggingface_mask import triton_attention_mask
from tests.models.checks import check_accuracy, inputs_of, logits_of, twins
from tests.models.packing import documents_of, packed
from tests.models.tiny import DEVICE, MODELS, PADDINGS, WINDOW, Batch, batch_of, cache_of, tiny_model
from tests.support.accuracy import AccuracyError, ErrorPool

pytestmark = pytest.mark.gpu

DECODERS = ("llama", "mistral", "gemma2", "gpt_oss")
WINDOWED = ("mistral", "gemma2", "gemma3", "gpt_oss")
DRAWS = 8


@pytest.fixture
def fresh_inductor(fresh_compiler, tmp_path):
    """An empty compile cache: a stale one turns failures green."""
    with fresh_cache(dir=str(tmp_path)):
        yield


@contextlib.contextmanager
def no_synchronisation() -> Iterator[None]:
    """Whoever waits for the device inside raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def no_synchronisation_of_ours() -> Iterator[None]:
    """The same inside the attention function and the mask function, both of which must be called."""
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for interface, function in (
            (AttentionInterface, triton_attention_forward),
            (AttentionMaskInterface, triton_attention_mask),
        ):
            patch.setitem(interface._global_mapping, ATTENTION_NAME, watched(function, calls))
        yield
    assert set(calls) == {"triton_attention_forward", "triton_attention_mask"}


def watched(function: Callable, calls: list[str]) -> Callable:
    def call(*args, **kwargs):
        calls.append(function.__name__)
        with no_synchronisation():
            return function(*args, **kwargs)

    return call


def twice(family: str) -> tuple[Callable, Callable]:
    """The first time compiles kernels and fills caches of its own, the second is watched. Transformers' own caches for
    sliding windows copy a number to the device, which waits for it: there only what is ours is watched."""
    return contextlib.nullcontext, no_synchronisation_of_ours if family in WINDOWED else no_synchronisation


def train(model: PreTrainedModel, arguments: dict, labels: Tensor) -> None:
    logits = model.train()(**arguments).logits
    cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100).backward()


class TestSynchronisation:
    @pytest.mark.parametrize("padding", PADDINGS)
    @pytest.mark.parametrize("family", MODELS)
    def test_training_on_padded_batches(self, family, padding):
        model, batch = tiny_model(family), batch_of(padding, family)
        arguments, labels = inputs_of(model, batch), batch.labels
        for watch in twice(family):
            with watch():
                train(model, arguments, labels)

    @pytest.mark.parametrize("rows", [1, 2])
    @pytest.mark.parametrize("form", ["positions", "cumulative lengths"])
    @pytest.mark.parametrize("family", DECODERS)
    def test_training_on_packed_documents(self, family, form, rows):
        model, arguments = tiny_model(family), packed(documents_of(rows), form)
        for watch in twice(family):
            with watch():
                train(model, arguments, arguments["input_ids"])

    @pytest.mark.parametrize("family", ["llama", "mistral"])
    def test_packed_documents_without_a_cache(self, family):
        # Transformers then looks at the position_ids itself, from the host: only what is ours is watched.
        model, arguments = tiny_model(family), packed(documents_of(), "positions, no cache")
        with no_synchronisation_of_ours():
            train(model, arguments, arguments["input_ids"])

    @pytest.mark.parametrize("padding", PADDINGS)
    @pytest.mark.parametrize("cache", ["dynamic", "static"])
    @pytest.mark.parametrize("family", DECODERS)
    def test_decoding(self, family, cache, padding):
        """From inside the windows of 8 to beyond them."""
        model = tiny_model(family)
        for watch in twice(family):
            step = decoding(model, model, batch_of(padding), cache_of(cache, model))
            with watch():
                for _ in range(6):
                    step()

    def test_compiled_decoding(self, fresh_inductor):
        model = tiny_model("llama")
        step = decoding(model, torch.compile(model, fullgraph=True), batch_of("left"), cache_of("static", model))
        for _ in range(3):
            step()
        with no_synchronisation():
            for _ in range(3):
                step()

    def test_would_be_noticed(self):
        length = torch.tensor([3], device=DEVICE)
        with no_synchronisation(), pytest.raises(RuntimeError, match="synchronizing"):
            length.item()


def decoding(
    model: PreTrainedModel, forward: Callable, batch: Batch, cache: DynamicCache | StaticCache
) -> Callable[[], Tensor]:
    """After a prefill of all but four positions in eager mode, a function for the next step, as `generate` makes it."""
    ids = torch.cat((batch.ids, batch.ids), dim=1)
    mask = torch.ones_like(ids)
    mask[:, : batch.ids.shape[1]] = batch.is_token
    length = batch.ids.shape[1] - 4
    with torch.no_grad():
        model(ids[:, :length], attention_mask=mask[:, :length], past_key_values=cache)

    def step() -> Tensor:
        nonlocal length
        length += 1
        inputs = model.prepare_inputs_for_generation(
            ids[:, length - 1 : length],
            past_key_values=cache,
            attention_mask=mask[:, :length],
            position_ids=mask[:, :length].sum(-1, keepdim=True) - 1,
        )
        with torch.no_grad():
            return forward(**inputs).logits

    return step


class TestMemory:
    """A decoding step over 32k keys takes less memory than one layer's K, so it copies neither K nor V of any."""

    LENGTH = 32768
    KEYS = (2, 8, LENGTH, 128)  # (B, Hkv, K, D)
    BYTES_OF_KEYS = 2 * 8 * LENGTH * 128 * 2

    def model(self, attention: str = ATTENTION_NAME) -> PreTrainedModel:
        sizes = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
        return tiny_model("llama", attention, **sizes, max_position_embeddings=self.LENGTH).bfloat16()

    def keys(self) -> Tensor:
        return torch.randn(self.KEYS, device=DEVICE, dtype=torch.bfloat16)

    def step(self, model: PreTrainedModel, forward: Callable) -> Callable[[], Tensor]:
        """One decoding step over a static cache that is full but for eight positions."""
        cache, ids = StaticCache(config=model.config, max_cache_len=self.LENGTH), torch.full((2, 1), 5, device=DEVICE)
        for layer in range(model.config.num_hidden_layers):
            cache.update(self.keys()[:, :, 8:], self.keys()[:, :, 8:], layer)
        mask = torch.ones(2, self.LENGTH, dtype=torch.long, device=DEVICE)
        mask[1, :1000] = 0

        def step() -> Tensor:
            inputs = model.prepare_inputs_for_generation(
                ids, past_key_values=cache, attention_mask=mask, position_ids=mask[:, -1:]
            )
            with torch.no_grad():
                return forward(**inputs).logits

        return step

    @pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
    def test_static_cache(self, is_compiled, fresh_inductor):
        model = self.model()
        step = self.step(model, torch.compile(model, fullgraph=True) if is_compiled else model)
        for _ in range(3):
            step()
        assert growth_of(step) < self.BYTES_OF_KEYS

    @pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
    @pytest.mark.parametrize("is_padded", [False, True], ids=["no_mask", "mask"])
    def test_dynamic_cache(self, is_padded, is_compiled, fresh_inductor):
        """Of the attention function alone: the cache itself concatenates."""
        module, key, value = self.model().model.layers[0].self_attn, self.keys(), self.keys()
        query = torch.randn(2, 32, 1, 128, device=DEVICE, dtype=torch.bfloat16)
        mask = None
        if is_padded:
            tokens = torch.ones(2, self.LENGTH, dtype=torch.bool, device=DEVICE)
            tokens[1, :1000] = False
            mask = triton_attention_mask(
                batch_size=2, q_length=1, kv_length=self.LENGTH, q_offset=self.LENGTH - 1, device=DEVICE,
                mask_function=causal_mask_function, attention_mask=tokens, config=module.config,
            )  # fmt: skip
        attend = triton_attention_forward
        if is_compiled:
            attend = torch.compile(attend, fullgraph=True)

        def call() -> Tensor:
            with torch.no_grad():
                return attend(module, query, key, value, mask, scaling=module.scaling)[0]

        for _ in range(2):
            call()
        assert growth_of(call) < self.BYTES_OF_KEYS

    def test_would_be_noticed(self):
        model = self.model("eager")  # repeats K and V for each query head
        step = self.step(model, model)
        step()
        assert growth_of(step) > self.BYTES_OF_KEYS


def growth_of(call: Callable[[], Tensor]) -> int:
    """Bytes that a call has in use at its peak, beyond those in use before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("use_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("padding", ["none", "left"])
# Shorter ones get a third: torch specialises sizes of 1, of positions less one and of positions beyond the window too.
@pytest.mark.parametrize(("family", "shortest"), [("llama", 3), ("mistral", WINDOW + 2)])
def test_two_frames_for_ten_lengths(family, shortest, padding, use_cache, fresh_inductor):
    model, counter = tiny_model(family), CompileCounterWithBackend("inductor")
    forward = torch.compile(model, fullgraph=True, backend=counter)
    for length in (31, 11, shortest, 13, 20, 57, 64, 100, 17, 45):
        batch = batch_of(padding, length=length)
        with torch.no_grad():
            found = forward(batch.ids, attention_mask=batch.mask, use_cache=use_cache).logits[batch.is_token]
            expected = model(batch.ids, attention_mask=batch.mask, use_cache=use_cache).logits[batch.is_token]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert 1 <= counter.frame_count <= 2


class TestBfloat16:
    @pytest.mark.parametrize("padding", PADDINGS)
    @pytest.mark.parametrize("family", MODELS)
    def test_logits(self, family, padding):
        """The accuracy rule, with eager attention as the reference, pooled over some batches if the first fails."""
        # Which expert is chosen must not hang on a rounding.
        model = tiny_model(family, **({"num_experts_per_tok": 2} if family == "gpt_oss" else {})).bfloat16()
        (eager, exact), pool = twins(model), ErrorPool("logits")
        for seed in range(DRAWS):
            batch = batch_of(padding, family, seed=seed)
            pool.add(logits_of(model, batch), logits_of(exact, batch), [logits_of(eager, batch)])
            if pool.excess() is None:
                return
        raise AccuracyError(pool.excess())

    @pytest.mark.parametrize("family", ["llama", "bert"])
    def test_a_lost_mask_would_be_noticed(self, family):
        model, batch = tiny_model(family).bfloat16(), batch_of("left")
        eager, exact = (logits_of(twin, batch) for twin in twins(model))
        without_mask = model(batch.ids).logits[batch.is_token].detach()
        with pytest.raises(AccuracyError, match="logits: max error"):
            check_accuracy("logits", without_mask, exact, eager)

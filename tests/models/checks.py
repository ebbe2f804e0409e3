"""What the tests of this folder compare: a model's results with those of eager attention, under the accuracy rule.

Eager attention has the models' dtype and is the reference of the rule; attention in float64 is exact.
"""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import cross_entropy
from transformers import AttentionInterface, AttentionMaskInterface, CompileConfig, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from tests.models.tiny import LENGTH, Batch, cache_of
from tests.support.accuracy import AccuracyError, ErrorPool

NEW_TOKENS = 32  # far beyond the windows
CHUNKS = (slice(0, 9), slice(9, 10), slice(10, LENGTH))


def twins(model: PreTrainedModel) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same weights with eager attention, in the model's dtype; and with exact attention, in float64."""
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    eager.set_attn_implementation("eager")
    exact.set_attn_implementation("exact")
    return eager, exact


def exact_attention(
    module, query, key, value, attention_mask, scaling=None, softcap=None, s_aux=None, **kwargs
) -> tuple[Tensor, None]:
    """Transformers' eager attention computes its softmax in float32, and in float64 gives NaN for left padding."""
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, dim=1) for t in (key, value))
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -torch.inf)
    sink = scores.new_full((1,), -torch.inf) if s_aux is None else s_aux
    sink = sink.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    scores = torch.cat((scores, sink), dim=-1)
    sees = (scores > -torch.inf).any(-1, keepdim=True)
    weights = scores.where(sees, 0.0).softmax(-1).where(sees, 0.0)[..., :-1]
    return (weights @ value).transpose(1, 2).contiguous(), None


def exact_mask(**kwargs):
    return sdpa_mask(**{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})


AttentionInterface.register("exact", exact_attention)
AttentionMaskInterface.register("exact", exact_mask)


def check_accuracy(name: str, result: Tensor, exact: Tensor, eager: Tensor) -> None:
    """The accuracy rule, with eager attention as the reference in the same dtype."""
    errors = ErrorPool(name)
    errors.add(result, exact, [eager])
    if excess := errors.excess():
        raise AccuracyError(excess)


def inputs_of(model: PreTrainedModel, batch: Batch, chunk: slice = slice(None)) -> dict[str, Tensor]:
    """The batch's, in the model's dtype."""
    return {n: t.to(model.dtype) if t.is_floating_point() else t for n, t in batch.inputs(chunk).items()}


def logits_of(model: PreTrainedModel, batch: Batch, forward: Callable | None = None, **options) -> Tensor:
    """Logits of the tokens that are not padding, (tokens, vocabulary)."""
    with torch.no_grad():
        return (forward or model.forward)(**inputs_of(model, batch), **options).logits[batch.is_token]


def logits_in_chunks(
    model: PreTrainedModel, batch: Batch, cache: str, forward: Callable | None = None, chunks=CHUNKS
) -> Tensor:
    """The same through a cache, some positions at a time."""
    past, call, logits = cache_of(cache, model), forward or model.forward, []
    with torch.no_grad():
        for chunk in chunks:
            inputs = inputs_of(model, batch, chunk)
            logits.append(call(**inputs, past_key_values=past).logits)
    return torch.cat(logits, dim=1)[batch.is_token]


def check_logits(model: PreTrainedModel, batch: Batch, cache: str | None = None, forward: Callable | None = None):
    """Through a cache or without one, against eager attention without one."""
    eager, exact = (logits_of(twin, batch, use_cache=False) for twin in twins(model))
    if cache is None:
        ours = logits_of(model, batch, forward, use_cache=False)
    else:
        ours = logits_in_chunks(model, batch, cache, forward)
    check_accuracy("logits", ours, exact, eager)


def compiled(model: PreTrainedModel, backend: str = "aot_eager") -> tuple[Callable, CompileCounterWithBackend]:
    """The model's forward in one graph, and what counts its graphs."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model.forward, fullgraph=True, backend=counter), counter


def compiled_decoding(counter: CompileCounterWithBackend) -> dict:
    """Options of `generate` that compile its decoding, on every device, in one graph."""
    # generate() copies its configuration, a counter in it too, but not a function.
    compile_config = CompileConfig(fullgraph=True, backend=lambda graph, inputs: counter(graph, inputs), mode=None)
    compile_config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": compile_config}


def greedy(model: PreTrainedModel, batch: Batch, **options) -> Tensor:
    """(B, NEW_TOKENS); models with a decoder leave the prompt out, or put a token before it."""
    tokens = model.generate(**inputs_of(model, batch), max_new_tokens=NEW_TOKENS, do_sample=False, **options)
    return tokens[:, -NEW_TOKENS:]


def check_tokens(model: PreTrainedModel, eager: PreTrainedModel, batch: Batch, **options) -> None:
    """Greedy generation: the same tokens as eager attention with a dynamic cache."""
    expected = greedy(eager, batch)
    assert expected.unique().numel() > 5, "a model that repeats itself tests nothing"
    assert torch.equal(greedy(model, batch, **options), expected)


def loss_of(model: PreTrainedModel, batch: Batch, forward: Callable | None = None) -> Tensor:
    # Whisper of Transformers 5.17 makes its cache in a way that cannot be traced.
    options = {"use_cache": False} if batch.encoder else {}
    logits = (forward or model.forward)(**inputs_of(model, batch), **options).logits
    return cross_entropy(logits[batch.is_token], batch.ids[batch.is_token])


def loss_and_gradients(model: PreTrainedModel, batch: Batch, forward: Callable | None = None) -> dict[str, Tensor]:
    # In training, Whisper of Transformers 5.17 draws which layers to leave out, and that cannot be traced either.
    model.train(forward is None or model.config.model_type != "whisper")
    model.zero_grad()
    loss = loss_of(model, batch, forward)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **gradients}


def check_training(model: PreTrainedModel, batches: Iterable[Batch], forward: Callable | None = None) -> None:
    """The loss, and the gradients of all parameters: of the first batch, or, if it fails, of the batches together."""
    pools = ErrorPool("loss"), ErrorPool("gradients")
    for batch in batches:
        ours = loss_and_gradients(model, batch, forward)
        eager, exact = (loss_and_gradients(twin, batch) for twin in twins(model))
        assert ours.keys() == exact.keys()
        of_ours, of_exact, of_eager = (_split_loss(results) for results in (ours, exact, eager))
        assert of_exact[1].abs().max() > 1e-2
        for pool, *results, reference in zip(pools, of_ours, of_exact, of_eager, strict=True):
            pool.add(*results, [reference])
        if all(pool.excess() is None for pool in pools):
            return
    raise AccuracyError("; ".join(filter(None, (pool.excess() for pool in pools))))


def _split_loss(results: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(1,) and (parameters,)."""
    loss, *gradients = (t.flatten() for t in results.values())
    return loss, torch.cat(gradients)

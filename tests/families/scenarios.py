"""What is compared: calls of a model that run with eager attention and with ours, and what of their results counts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.families.images import image_arguments
from tests.families.inputs import LENGTH, ROWS, Arguments, Inputs, with_padding

NEW_TOKENS = 4
PADDINGS = {"right": "right padding", "left": "left padding", "holes": "holes"}
FIRST_PART = 8
DOCUMENTS = (5, 1, LENGTH - 6)
SKIPPED_OUTPUTS = ("past_key_values", "attentions", "hidden_states", "cache", "loss", "mems", "rope_deltas")

Results = dict[str, Tensor]
Run = Callable[[PreTrainedModel], Results]


@dataclass
class Scenario:
    """A call to compare. `also`: other calls of eager whose results are right, too."""

    name: str
    run: Run
    also: list[Run] = field(default_factory=list)


class Batch(NamedTuple):
    """Arguments, and masks of their tokens by length."""

    arguments: Arguments
    masks: dict[int, Tensor] = {}  # noqa: RUF012

    def scenario(self, name: str, call: Callable[..., Results], **options: Any) -> Scenario:
        return Scenario(name, lambda model: call(model, self.arguments, self.masks, **options))

    def without_decoder(self) -> "Batch":
        return Batch({name: value for name, value in self.arguments.items() if not name.startswith("decoder_")})


def scenarios(model: PreTrainedModel, inputs: Inputs, arguments: Arguments) -> Iterator[Scenario]:
    """Those that a model has the arguments for, whether or not eager attention can run them."""
    ids = arguments.get("input_ids")
    is_text = ids is not None and ids.ndim == 2 and ids.shape[0] == ROWS and "attention_mask" in inputs.names
    whole = Batch(arguments)
    yield whole.scenario("no padding", forward)
    if is_text:
        for padding, name in PADDINGS.items():
            yield _padded(arguments, padding, inputs).scenario(name, forward)
        yield from _packed(inputs, arguments)
    yield (_padded(arguments, "mixed", inputs) if is_text else whole).scenario("gradients", gradients)
    if model.can_generate():
        yield from _generated(inputs, whole, is_text)
    if is_text and (with_images := image_arguments(model, inputs)) is not None:
        given, mask = with_images
        images = Batch(given, {mask.shape[1]: mask.bool()})
        yield images.scenario("images", forward)
        if model.can_generate():
            yield images.scenario("images, generate", generated)


def _padded(arguments: Arguments, padding: str, inputs: Inputs) -> Batch:
    given, masks = dict(arguments), {}
    for prefix in ("", "decoder_"):
        if f"{prefix}attention_mask" not in inputs.names:
            continue
        if (with_mask := with_padding(arguments, padding, prefix)) is None:
            continue
        given |= {name: with_mask[name] for name in (f"{prefix}input_ids", f"{prefix}attention_mask")}
        mask = given[f"{prefix}attention_mask"]
        masks[mask.shape[1]] = mask.bool()
    return Batch(given, masks)


def _packed(inputs: Inputs, arguments: Arguments) -> Iterator[Scenario]:
    """One row of documents whose positions restart, and one whose positions jump.

    Eager attention tells documents apart only in some models and only without a cache. To tell them apart anywhere is
    right, too.
    """
    if "position_ids" not in inputs.names or arguments.keys() != {"input_ids"}:
        return
    ids = arguments["input_ids"][:1]
    restarting = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]
    jumping = torch.cat([torch.arange(6), torch.arange(20, 20 + LENGTH - 6)])[None]

    def call(positions: Tensor, **options: Any) -> Run:
        return lambda m: forward(m, {"input_ids": ids, "position_ids": positions, **options})

    def alone(model: PreTrainedModel) -> Results:
        results = [forward(model, {"input_ids": document}) for document in ids.split(DOCUMENTS, dim=1)]
        return {name: torch.cat([r[name] for r in results], dim=1) for name in results[0]}

    yield Scenario("packed, no cache", call(restarting, use_cache=False), also=[alone])
    yield Scenario("packed", call(restarting), also=[call(restarting, use_cache=False), alone])
    yield Scenario("jumping positions", call(jumping))


def _generated(inputs: Inputs, whole: Batch, is_text: bool) -> Iterator[Scenario]:
    paddings = {"": whole}
    if is_text:
        paddings[", left padding"] = _padded(whole.arguments, "left", inputs)
    for cache in ("dynamic", "static"):
        options = {"cache_implementation": cache} if cache == "static" else {}
        for suffix, batch in paddings.items():
            yield batch.without_decoder().scenario(f"generate, {cache} cache{suffix}", generated, **options)
    last = list(paddings.values())[-1]
    yield last.without_decoder().scenario("beams", generated, num_beams=2)
    if is_text:
        holes = _padded(whole.arguments, "holes", inputs)
        yield holes.without_decoder().scenario("generate, holes", generated)
    if is_text and whole.arguments.keys() == {"input_ids"}:
        yield last.scenario("in two parts", in_two_parts)


# Calls.


def forward(model: PreTrainedModel, arguments: Arguments, masks: dict[int, Tensor] | None = None) -> Results:
    torch.manual_seed(0)
    with torch.no_grad():
        return valid(tensors_of(model(**_copied(arguments))), masks or {})


def in_two_parts(model: PreTrainedModel, arguments: Arguments, masks: dict[int, Tensor]) -> Results:
    """The second part of a text, with the first one in a cache."""
    ids, mask = arguments["input_ids"], arguments["attention_mask"]
    with torch.no_grad():
        first = model(input_ids=ids[:, :FIRST_PART], attention_mask=mask[:, :FIRST_PART], use_cache=True)
        second = model(input_ids=ids[:, FIRST_PART:], attention_mask=mask, past_key_values=first.past_key_values)
    return valid(tensors_of(second), {ids.shape[1] - FIRST_PART: mask[:, FIRST_PART:].bool()})


def gradients(model: PreTrainedModel, arguments: Arguments, masks: dict[int, Tensor]) -> Results:
    """Of all parameters in training, for a loss that weighs every element of the results at random.

    Its batch has padding on both sides, and holes.
    """
    torch.manual_seed(0)
    model.train()
    try:
        model.zero_grad()
        results = valid(tensors_of(model(**_copied(arguments))), masks)
        random = torch.Generator().manual_seed(0)
        loss = sum((t * torch.randn(t.shape, generator=random)).mean() for t in results.values() if t.requires_grad)
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    finally:
        model.zero_grad()
        model.eval()


def generated(model: PreTrainedModel, arguments: Arguments, masks: dict[int, Tensor], **options: Any) -> Results:
    """The logits of each step of greedy decoding or of a search by beams."""
    torch.manual_seed(0)
    made = model.generate(
        **_copied(arguments), max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False,
        return_dict_in_generate=True, output_logits=True, disable_compile=True, **options,
    )  # fmt: skip
    return {f"step {i}": logits.float() for i, logits in enumerate(made.logits)}


def _copied(arguments: Arguments) -> Arguments:
    return {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}


def tensors_of(output: Any, name: str = "") -> Results:
    """Tensors in floating point anywhere in a model's output, without caches and what is asked for in training."""
    if isinstance(output, Tensor):
        return {name: output} if output.is_floating_point() and output.numel() else {}
    if isinstance(output, dict):
        parts = output.items()
    elif isinstance(output, list | tuple):
        parts = enumerate(output)
    else:
        return {}
    found: Results = {}
    for key, value in parts:
        if not any(skipped in str(key) for skipped in SKIPPED_OUTPUTS) or str(key) == "last_hidden_state":
            found |= tensors_of(value, f"{name}.{key}" if name else str(key))
    return found


def valid(results: Results, masks: dict[int, Tensor]) -> Results:
    """What belongs to tokens: of padded calls no padding, and nothing that a model takes from a fixed position."""

    def masked(name: str, mask: Tensor, behind: int = 0) -> Tensor:
        return results[name][nn.functional.pad(mask, (0, behind), value=True)]

    lengths = {name: t.shape[1] for name, t in results.items() if t.ndim >= 2 and t.shape[0] == ROWS}
    if found := {name: masked(name, masks[n]) for name, n in lengths.items() if n in masks}:
        return found
    # Some models put an image behind the text.
    longest = max(masks, default=0)
    behind = {name: n - longest for name, n in lengths.items() if masks and n > longest and results[name].ndim == 3}
    return {name: masked(name, masks[longest], n) for name, n in behind.items()} or results

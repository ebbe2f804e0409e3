"""What the adapter does not support raises, and names itself."""

import types

import pytest
import torch
from torch._dynamo.exc import Unsupported
from transformers import (
    DogeConfig,
    DogeForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LongT5Config,
    LongT5ForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
    masking_utils,
)

from fa_ops.integrations.huggingface import UNSUPPORTED_ARGUMENTS, triton_attention_forward
from fa_ops.integrations.huggingface_mask import triton_attention_mask
from tests.models import support
from tests.models.tiny import ATTENTION_NAME, DEVICE, SIZES, batch_of, cache_of, tiny_model


def causal_mask(window=None, padding=None):
    """For a `call` of Llama's, or of Mistral's with its window."""
    causal, sliding = masking_utils.causal_mask_function, masking_utils.sliding_window_causal_mask_function
    return triton_attention_mask(
        batch_size=2, q_length=5, kv_length=5, mask_function=causal if window is None else sliding(window),
        config=None if window is None else tiny_model("mistral", sliding_window=window).config,
        attention_mask=padding, device=DEVICE,
    )  # fmt: skip


def call(attention_mask=None, module=None, **kwargs):
    module = module or tiny_model("llama").model.layers[0].self_attn
    query, key = torch.randn(2, 4, 5, 16, device=DEVICE), torch.randn(2, 2, 5, 16, device=DEVICE)
    return triton_attention_forward(module, query, key, key, attention_mask, **kwargs)


@pytest.mark.parametrize("name", UNSUPPORTED_ARGUMENTS)
def test_unsupported_argument(name):
    with pytest.raises(NotImplementedError, match=rf"LlamaAttention of llama: {name} \(.*\) is not supported"):
        call(**{name: torch.ones(1)})
    call(**{name: None})


def test_unknown_argument():
    with pytest.raises(TypeError, match=r"LlamaAttention of llama: .* does not know the argument softcapping"):
        call(softcapping=3.0)


def test_masks_of_another_form_given_to_a_model():
    model, batch = tiny_model("llama"), batch_of("none")
    with pytest.raises(NotImplementedError, match=r"attention_mask float32 \(3, 1, 11, 11\) given"):
        model(batch.ids, attention_mask=torch.zeros(3, 1, 11, 11, device=DEVICE))
    with pytest.raises(NotImplementedError, match=r"attention_mask: bool \(3, 1, 11\) given"):
        triton_attention_mask(
            batch_size=3,
            q_length=11,
            kv_length=11,
            mask_function=masking_utils.causal_mask_function,
            attention_mask=torch.ones(3, 1, 11, dtype=torch.bool),
        )


def test_is_causal_is_never_guessed():
    with pytest.raises(ValueError, match="Module of an unknown model: no attention_mask, is_causal was not"):
        call(module=torch.nn.Module())
    call(module=torch.nn.Module(), is_causal=True)
    call(causal_mask(), module=torch.nn.Module())


def test_dropout_in_training():
    model, batch = tiny_model("llama", attention_dropout=0.1), batch_of("none")
    model(batch.ids)
    with pytest.raises(
        NotImplementedError, match=r"LlamaAttention of llama: dropout=0\.1 .* config\.attention_dropout"
    ):
        model.train()(batch.ids)


def test_dropout_under_another_name_in_the_configuration():
    module = torch.nn.Module().train()
    module.config = types.SimpleNamespace(model_type="bert", attention_probs_dropout_prob=0.2)
    with pytest.raises(NotImplementedError, match=r"Module of bert: .* config\.attention_probs_dropout_prob to 0"):
        call(module=module, dropout=0.2, is_causal=False)


def test_output_attentions():
    with pytest.raises(NotImplementedError, match=r'output_attentions .*attn_implementation="eager"'):
        tiny_model("llama")(batch_of("none").ids, output_attentions=True)


POSITION_BIASES = {
    "T5": (T5Config, T5ForConditionalGeneration),
    "mT5": (MT5Config, MT5ForConditionalGeneration),
    "UMT5": (UMT5Config, UMT5ForConditionalGeneration),
    "LongT5": (LongT5Config, LongT5ForConditionalGeneration),
    "Switch Transformers": (SwitchTransformersConfig, SwitchTransformersForConditionalGeneration),
}


def with_position_biases(name):
    config_class, model_class = POSITION_BIASES[name]
    config = config_class(
        vocab_size=97, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2, attn_implementation=ATTENTION_NAME
    )
    ids = batch_of("none").ids
    return model_class(config), {"input_ids": ids, "decoder_input_ids": ids}


def doge(_):
    return DogeForCausalLM(DogeConfig(**SIZES, attn_implementation=ATTENTION_NAME)), batch_of("none").inputs()


def llama4(_):
    config = Llama4TextConfig(
        **SIZES, attention_chunk_size=8, intermediate_size_mlp=32, num_local_experts=2,
        layer_types=["chunked_attention", "full_attention"], attn_implementation=ATTENTION_NAME,
    )  # fmt: skip
    return Llama4ForCausalLM(config), batch_of("none").inputs()


def gemma3_with_images(_):
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    config = Gemma3Config(
        text_config={**SIZES, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
        vision_config=vision, mm_tokens_per_image=4, image_token_index=3, boi_token_index=4, eoi_token_index=5,
        attn_implementation=ATTENTION_NAME,
    )  # fmt: skip
    ids = torch.full((1, 11), 9, device=DEVICE)
    types_of_tokens = torch.zeros_like(ids)
    ids[:, 2:6], types_of_tokens[:, 2:6] = 3, 1
    image = torch.randn(1, 3, 16, 16, device=DEVICE)
    inputs = {"input_ids": ids, "token_type_ids": types_of_tokens, "pixel_values": image}
    return Gemma3ForConditionalGeneration(config), inputs


REFUSED = {
    **dict.fromkeys(POSITION_BIASES, (with_position_biases, r"Attention of \w+: position_bias")),
    "LongT5": (with_position_biases, "LongT5Stack: LongT5LocalAttention, .* computes attention itself"),
    "Switch Transformers": (with_position_biases, "SwitchTransformersStack: it declares support for neither sdpa"),
    "Doge": (doge, "DogeModel: it makes a mask in floating point of its own"),
    "Llama-4": (llama4, r"mask_function: chunked_overlay.* \(chunk_size=8\)"),
    "Gemma-3 with images": (gemma3_with_images, r"mask_function: causal_mask_function \| blockwise_overlay"),
}


@pytest.mark.parametrize("name", [name for names in support.REFUSED.values() for name in names])
def test_refused_models(name):
    of_name, message = REFUSED[name]

    def build_and_run():
        model, inputs = of_name(name)
        model.to(DEVICE).eval()(**inputs)

    with pytest.raises(NotImplementedError, match=message):
        build_and_run()


def test_gemma3_without_images():
    model, inputs = gemma3_with_images("")
    assert model.to(DEVICE).eval()(torch.full_like(inputs["input_ids"], 9)).logits.isfinite().all()


@pytest.mark.parametrize("is_masked", [False, True], ids=["no mask", "mask"])
def test_a_window_that_the_mask_does_not_have(is_masked):
    mask = causal_mask() if is_masked else None
    call(mask, sliding_window=5)
    with pytest.raises(ValueError, match="LlamaAttention of llama: sliding_window=4 given for 5 keys, with an"):
        call(mask, sliding_window=4)


def test_a_window_of_another_size_than_the_masks():
    module = tiny_model("mistral", sliding_window=3).model.layers[0].self_attn
    call(causal_mask(3), module, sliding_window=3)
    with pytest.raises(ValueError, match=r"sliding_window=4 given, config.sliding_window is 3; .* accepts \[3\]"):
        call(causal_mask(3), module, sliding_window=4)


def test_a_window_of_another_size_than_the_configurations():
    with pytest.raises(ValueError, match=r"a window of 4 given, config.sliding_window is 8 \(mistral\)"):
        triton_attention_mask(
            batch_size=3,
            q_length=11,
            kv_length=11,
            mask_function=masking_utils.sliding_window_causal_mask_function(4),
            config=tiny_model("mistral").config,
        )


def test_the_mask_decides_the_direction():
    """As in eager attention, which adds it whatever the module says of itself."""
    assert torch.equal(_seeded(causal_mask(), is_causal=False), _seeded(causal_mask(), is_causal=True))
    assert not torch.equal(_seeded(None, is_causal=False), _seeded(None, is_causal=True))


def _seeded(mask, **kwargs):
    torch.manual_seed(0)
    return call(mask, **kwargs)[0]


@pytest.mark.parametrize(
    ("mask_function", "leaf"),
    [
        (masking_utils.chunked_causal_mask_function(4, torch.zeros(3, dtype=torch.long)), "chunked_overlay"),
        (
            masking_utils.and_masks(
                masking_utils.sliding_window_causal_mask_function(4), masking_utils.sliding_window_overlay(3)
            ),
            r"two windows \(4 and 3\)",
        ),
        (
            masking_utils.or_masks(
                masking_utils.causal_mask_function, masking_utils.sliding_window_bidirectional_overlay(2)
            ),
            r"causal_mask_function \| sliding_window_bidirectional_overlay",
        ),
        (masking_utils.and_masks(masking_utils.causal_mask_function, lambda b, h, q, k: k % 2 == 0), "<lambda>"),
        (torch.nn.Identity(), r"Identity\(\)"),
    ],
    ids=["chunked", "two windows", "union", "of the user", "no function"],
)
def test_leaves_of_the_mask_function(mask_function, leaf):
    with pytest.raises(NotImplementedError, match=rf"mask_function: {leaf}"):
        triton_attention_mask(batch_size=3, q_length=11, kv_length=11, mask_function=mask_function)


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_packed_sequences_over_earlier_keys_stop_the_device(is_compiled, fresh_compiler):
    # On the CPU: a failed assertion ends the CUDA context of a process.
    model, ids = tiny_model("llama", num_hidden_layers=1).cpu(), batch_of("none").ids[:1].cpu()
    forward = torch.compile(model, fullgraph=True, backend="aot_eager") if is_compiled else model
    past = cache_of("dynamic", model)
    model(ids[:, :3], past_key_values=past)
    forward(ids[:, 3:7], position_ids=torch.arange(3, 7)[None], past_key_values=past)
    with pytest.raises(RuntimeError, match="position_ids restart within a row"):
        forward(ids[:, 7:11], position_ids=torch.tensor([[7, 8, 0, 1]]), past_key_values=past)


def test_more_documents_than_provided_for_stop_the_device():
    model = tiny_model("llama", num_hidden_layers=1).cpu()
    ids = torch.ones(1, 66, dtype=torch.long)
    model(ids, position_ids=torch.arange(66)[None])
    with pytest.raises(RuntimeError, match="more documents than max_documents; give the cumulative lengths"):
        model(ids, position_ids=torch.zeros_like(ids))


def test_half_of_the_cumulative_lengths():
    with pytest.raises(ValueError, match="cu_seq_lens_q and cu_seq_lens_k: one of them given"):
        call(cu_seq_lens_q=torch.tensor([0, 10], device=DEVICE))


def test_cumulative_lengths_with_padding():
    mask = causal_mask(padding=torch.tensor([[0, 1, 1, 1, 1], [1] * 5], device=DEVICE))
    lengths = torch.tensor([0, 10], device=DEVICE)
    with pytest.raises(NotImplementedError, match="cu_seq_lens_q, cu_seq_lens_k: given with an attention_mask"):
        call(mask, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths)


@pytest.mark.parametrize(("overlay", "leaf"), [("union", "or_masks"), ("of the user", "and_masks")])
def test_leaves_while_tracing(overlay, leaf, fresh_compiler):
    def masked():
        causal = masking_utils.causal_mask_function
        mask_function = {
            "sliding": masking_utils.sliding_window_causal_mask_function(4),
            "union": masking_utils.or_masks(causal, masking_utils.bidirectional_mask_function),
            "of the user": masking_utils.and_masks(causal, lambda b, h, q, k: k % 2 == 0),
        }[overlay]
        return triton_attention_mask(
            batch_size=3,
            q_length=11,
            kv_length=11,
            mask_function=mask_function,
            attention_mask=torch.ones(3, 11, dtype=torch.bool),
            use_vmap=overlay == "of the user",
        )

    with pytest.raises(Unsupported, match=f"NotImplementedError.*mask_function: {leaf}"):
        torch.compile(masked, fullgraph=True, backend="eager")()

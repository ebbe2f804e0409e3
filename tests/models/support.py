"""The support matrix, family of models by feature: it parametrizes the tests, and README.md shows it."""

import textwrap

import pytest

TITLES = {
    "llama": "Llama",
    "qwen3": "Qwen3",
    "mistral": "Mistral",
    "gemma2": "Gemma-2",
    "gemma3": "Gemma-3",
    "gpt_oss": "gpt-oss",
    "t5gemma": "T5Gemma",
    "whisper": "Whisper",
    "bert": "BERT",
    "modernbert": "ModernBERT",
}
FAMILIES = tuple(TITLES)
ENCODERS = ("bert", "modernbert")
WITH_DECODER = tuple(family for family in FAMILIES if family not in ENCODERS)
WITH_CROSS_ATTENTION = ("t5gemma", "whisper")
DECODERS = tuple(family for family in WITH_DECODER if family not in WITH_CROSS_ATTENTION)
FEATURES = {
    "left padding": FAMILIES,
    "right padding": FAMILIES,
    "dynamic cache": WITH_DECODER,
    "static cache": WITH_DECODER,
    "packed documents": DECODERS + ENCODERS,
    "sliding window": ("mistral", "gemma2", "gemma3", "gpt_oss", "t5gemma", "modernbert"),
    "softcap": ("gemma2", "t5gemma"),
    "sinks": ("gpt_oss",),
    "cross attention": WITH_CROSS_ATTENTION,
    "training": FAMILIES,
}
REFUSED = {
    "position biases": ("T5", "mT5", "UMT5", "LongT5", "Switch Transformers"),
    "a mask in floating point": ("Doge",),
    "chunked attention": ("Llama-4",),
    "tokens of an image that see each other": ("Gemma-3 with images",),
}
MODES = ("eager", "compiled")

README_BEGIN, README_END = "<!-- support matrix -->\n", "<!-- end of the support matrix -->\n"


def cells(families: tuple[str, ...], quick: tuple[str, ...] = ()) -> list:
    """(family, is_compiled) for parametrize; compiled ones are slow but for the `quick`."""
    return [
        pytest.param(
            family,
            mode == "compiled",
            id=f"{family}-{mode}",
            marks=[pytest.mark.slow] if mode == "compiled" and family not in quick else [],
        )
        for mode in MODES
        for family in families
    ]


def is_name_of(test: str, family: str, feature: str, mode: str) -> bool:
    """Whether a test's name says that it sets a cell of the matrix."""
    name, _, parameters = test.replace("_", " ").partition("[")
    parameters = parameters.removesuffix("]").split("-")
    return {family.replace("_", " "), mode} <= set(parameters) and feature in (name.removeprefix("test "), *parameters)


def rendered() -> str:
    """What README.md has to say between its markers."""
    rows = [("", *FEATURES), ("---", *[":-:"] * len(FEATURES))]
    rows += [(TITLES[f], *("✓" if f in having else "–" for having in FEATURES.values())) for f in FAMILIES]
    table = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    refused = "; ".join(f"{', '.join(models)} ({reason})" for reason, models in REFUSED.items())
    paragraphs = (
        "✓: tests of that name in [tests/models](tests/models/test_matrix.py) compare tiny random models with eager "
        "attention in float32, without and with `torch.compile(fullgraph=True)`: of padding and caches the logits, and "
        "32 greedy tokens; of training the gradients of all parameters; packed documents in every form, but of "
        "encoders by `cu_seq_lens_*` alone. –: the model, or Transformers for it, has no such thing.",
        f"Refused, by name: {refused}.",
    )
    return table + "".join(f"\n{textwrap.fill(p, 120, break_on_hyphens=False)}\n" for p in paragraphs)

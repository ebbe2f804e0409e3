"""Attention over sequences of different lengths, as a PyTorch op: `torch.ops.modelopt.varlen_attention`.

`fa_ops.IS_AVAILABLE` tells whether the Triton kernels can run here: Triton is installed, and there is a CUDA device of
compute capability 8.0 or higher. CPU tensors do not need it.

The environment variable FA_OPS_KERNEL says which kernels may run on a GPU: "auto", the default, those written for its
architecture wherever they know a call (`fa_ops.hopper`), and else the portable ones; "portable" the portable ones
alone. It is read once, at import. The logger "fa_ops.ops" says at level DEBUG which kernel a call runs.
"""

from fa_ops import ops, varlen
from fa_ops.attention import attention, varlen_attn, varlen_attn_out

__version__ = "0.1.0"


def __getattr__(name: str) -> bool:
    if name == "IS_AVAILABLE":  # asks the driver, which an import must not
        return ops.is_available()
    raise AttributeError(f"module 'fa_ops' has no attribute {name!r}")


def register_triton_attention() -> bool:
    """Registers `attn_implementation="modelopt_triton"` with Hugging Face Transformers; see
    `fa_ops.integrations.huggingface.register_triton_attention`."""
    from fa_ops.integrations import huggingface

    return huggingface.register_triton_attention()


def vouch_for(model_class: type) -> None:
    """Lets a model class have `attn_implementation="modelopt_triton"` that a look at its code would refuse; see
    `fa_ops.integrations.huggingface_guard.vouch_for`."""
    from fa_ops.integrations import huggingface_guard

    huggingface_guard.vouch_for(model_class)


__all__ = [
    "IS_AVAILABLE",
    "__version__",
    "attention",
    "register_triton_attention",
    "varlen",
    "varlen_attn",
    "varlen_attn_out",
    "vouch_for",
]

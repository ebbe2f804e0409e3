"""torch's context parallelism: `torch.distributed.tensor.experimental.context_parallel`.

Each process holds a part of every sequence there, and torch turns `scaled_dot_product_attention` into ring attention
over all of them. An attention function beside it would attend to the process's own part, in silence.
"""

import sys

import torch

_MODULE = "torch.distributed.tensor.experimental._context_parallel._attention"
_HANDLED = torch.ops.aten._scaled_dot_product_flash_attention.default


def refuse_context_parallel(owner: str) -> None:
    """Raises NotImplementedError, in the name of `owner`, inside torch's `context_parallel`, and where
    `_enable_context_parallel_dispatcher` is in force. torch.compile traces it, and its guards hold what was found."""
    module = sys.modules.get(_MODULE)
    # both forms give DTensor a handler of its own for SDPA, and take it back when they end
    if module is not None and _HANDLED in module.DTensor._op_dispatcher._custom_op_handlers:
        raise NotImplementedError(
            f"{owner}: called inside torch's context_parallel, which it does not know: it would attend to this "
            "process's part of the sequences alone; attn_implementation='sdpa' runs there"
        )

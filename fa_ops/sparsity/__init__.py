"""Sparse attention for Transformers models: `sparsify(model, config)`.

Skip-softmax leaves out blocks of keys whose scores lie far below the running maximum. `sparsify` switches it on inside
the attention op, calibrates it to a share of blocks to drop, measures it, and saves it with the model.
"""

from fa_ops.sparsity.apply import (
    calibrate,
    disable_sparse_attention,
    enable_sparse_attention,
    set_target_sparse_ratio,
    set_thresholds,
    sparsify,
)
from fa_ops.sparsity.attach import is_attn_sparsified, remove_sparse_attention
from fa_ops.sparsity.calibration import CalibrationError
from fa_ops.sparsity.config import SKIP_SOFTMAX_CALIB, SKIP_SOFTMAX_DEFAULT
from fa_ops.sparsity.export import export_sparse_attention_config, restore_sparse_attention
from fa_ops.sparsity.methods import SparseAttentionMethod, get_sparse_method, register_sparse_method
from fa_ops.sparsity.stats import block_counts, collect_stats, dropped_share, print_sparse_attention_summary, summary

__all__ = [
    "SKIP_SOFTMAX_CALIB",
    "SKIP_SOFTMAX_DEFAULT",
    "CalibrationError",
    "SparseAttentionMethod",
    "block_counts",
    "calibrate",
    "collect_stats",
    "disable_sparse_attention",
    "dropped_share",
    "enable_sparse_attention",
    "export_sparse_attention_config",
    "get_sparse_method",
    "is_attn_sparsified",
    "print_sparse_attention_summary",
    "register_sparse_method",
    "remove_sparse_attention",
    "restore_sparse_attention",
    "set_target_sparse_ratio",
    "set_thresholds",
    "sparsify",
    "summary",
]

"""Methods of sparse attention, one file each. Importing this package registers them."""

from fa_ops.sparsity.methods import flash_skip_softmax
from fa_ops.sparsity.methods.base import SparseAttentionMethod, get_sparse_method, register_sparse_method

__all__ = ["SparseAttentionMethod", "flash_skip_softmax", "get_sparse_method", "register_sparse_method"]

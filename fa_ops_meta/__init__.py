"""What can be said of `modelopt::varlen_attention` from metadata alone: validation, outputs, FLOPs.

Imports torch and nothing else, so a machine with neither Triton nor a GPU can load programs that hold the op.
"""

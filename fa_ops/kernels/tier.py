"""The environment variable FA_OPS_KERNEL, which says how far kernels must have been proven to run; read here, once.

"portable", the default: those that have been run on a GPU. "preview": also those that compile, and have not.
"""

import os

KERNEL_CHOICES = ("portable", "preview")

KERNEL_CHOICE = os.environ.get("FA_OPS_KERNEL", "portable")
if KERNEL_CHOICE not in KERNEL_CHOICES:
    raise ValueError(f"FA_OPS_KERNEL: {KERNEL_CHOICE!r} given, expected one of {', '.join(map(repr, KERNEL_CHOICES))}")

IS_PREVIEW = KERNEL_CHOICE == "preview"

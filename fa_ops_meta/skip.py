"""What skip-softmax means beyond its threshold: names and constants that no implementation may choose for itself."""

BLOCK_SIZES = (16, 32, 64, 128)  # rows of a query block, keys of a key block

# In which order a query block visits its key blocks; "diagonal" is the last of them.
VISIT_ORDERS = ("ascending", "diagonal_first", "first_then_descending", "descending")
VISIT_ORDER = "first_then_descending"

# Decoding restarts the running maximum every so many keys of a sequence, so that no split of the work matters.
DECODE_SEGMENT = 2048

BITS_PER_WORD = 32  # key blocks that one int32 of the block bits holds

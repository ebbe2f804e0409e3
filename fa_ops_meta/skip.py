"""What skip-softmax means beyond its threshold: names and constants that no implementation may choose for itself."""

BLOCK_SIZES = (16, 32, 64, 128)  # rows of a query block, keys of a key block

# In which order a query block visits its key blocks; "diagonal" is the last of them.
VISIT_ORDERS = ("ascending", "diagonal_first", "first_then_descending", "descending")
# Of the four, ascending adds the most loss at an equal share. Descending adds a little less than this one, but reaches
# smaller shares in a model with much weight on its first tokens: .37 of the blocks of 64 x 128 at 1,024 tokens, where
# this one reaches .49 (examples/benchmarks/results/sparsity-study-smollm2.md).
VISIT_ORDER = "first_then_descending"

# Decoding restarts the running maximum every so many keys of a sequence, so that no split of the work matters.
DECODE_SEGMENT = 2048

BITS_PER_WORD = 32  # key blocks that one int32 of the block bits holds

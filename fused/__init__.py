"""Functions of the training step that are worth a Triton kernel: torch operators, each with a plain torch reference.

Four operators, a folder each, whose name is the function's: `from fused.attention import attention`. A folder offers
its functions, the types of their arguments, the references (`_ref`) and the kernels' limits; its docstring says where
to start reading. Simplest first: layer_norm (rows, dropout drawn again in backward, sums without atomics),
softmax_dropout (the same for rows of scores), linear_cross_entropy (chunks of logits, an exact sample), attention.

Shared: dispatch.py chooses kernel or reference and imports Triton; dropout.py draws the masks; relative_bias.py and
samples.py are arguments of attention; rows.py sizes programs that hold whole rows; ahead_of_time.py compiles without a
GPU. FP32 inside whatever the inputs' precision, no sum by atomics. Knows tensors only: no modules, no processes.
"""

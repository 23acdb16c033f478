"""Attention inside samples, with the compact relative bias and dropout; FP32 inside. Start with operator.py.

operator.py has the public functions, their checks and gradients, kernels.py the kernels, launches.py their tile sizes
and arguments, reference.py the same mathematics in a few lines of torch, cpu.py with few passes over a CPU's memory.
"""

from fused.attention.launches import HEAD_DIMS, compile_cases
from fused.attention.operator import attention, attention_qkvpacked
from fused.attention.reference import attention_ref
from fused.dropout import MOST_POSITIONS, Dropout
from fused.relative_bias import CompactBias
from fused.samples import Samples, packed_samples, padded_samples

__all__ = [
    "HEAD_DIMS",
    "MOST_POSITIONS",
    "CompactBias",
    "Dropout",
    "Samples",
    "attention",
    "attention_qkvpacked",
    "attention_ref",
    "compile_cases",
    "packed_samples",
    "padded_samples",
]

"""Scale, relative bias, key padding, FP32 softmax and dropout of whole score matrices. Start with operator.py.

operator.py has the public function, the reference, launches and gradients, kernels.py the kernels.
"""

from fused.dropout import Dropout
from fused.relative_bias import CompactBias
from fused.softmax_dropout.operator import WIDEST, compile_cases, softmax_dropout, softmax_dropout_ref

__all__ = ["WIDEST", "CompactBias", "Dropout", "compile_cases", "softmax_dropout", "softmax_dropout_ref"]

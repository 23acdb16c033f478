"""Bias, dropout, residual and LayerNorm in one pass; FP32 inside. Start with operator.py.

operator.py has the public function, the reference, launches and gradients, kernels.py the kernels.
"""

from fused.layer_norm.operator import WIDEST, RowDropout, compile_cases, drop_rows, layer_norm, layer_norm_ref

__all__ = ["WIDEST", "RowDropout", "compile_cases", "drop_rows", "layer_norm", "layer_norm_ref"]

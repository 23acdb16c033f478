"""Bias, dropout, residual and LayerNorm, FP32 inside."""

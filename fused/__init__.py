"""Tensor functions of the training step that keep FP32 inside whatever their inputs' precision."""

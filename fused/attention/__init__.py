"""Attention with relative biases, samples side by side, and dropout."""

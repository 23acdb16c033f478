"""The vocabulary head: product, cross-entropy and sample in one pass over the logits."""

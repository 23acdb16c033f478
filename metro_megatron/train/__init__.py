"""The run: step, optimizer, metrics, checkpoints and the loop around them."""

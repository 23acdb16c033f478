"""From raw text to the micro batches of a training step."""

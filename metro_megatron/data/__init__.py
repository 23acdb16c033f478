"""From datasets on the disk to the micro batches of a training step."""

"""The exported model for transformers: its definition, the export, and reading checkpoints in one process."""

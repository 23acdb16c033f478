"""What an exported pair is worth without a task."""

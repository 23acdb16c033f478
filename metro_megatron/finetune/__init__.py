"""Fine-tuning exported models on labelled text."""

"""The stages of make demo."""

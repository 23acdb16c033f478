"""The stages of make demo and make learn."""

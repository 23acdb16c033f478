"""Pretraining of METRO-LM encoders on megatron-core, from raw text to a Hugging Face model."""

__version__ = "0.1.0"

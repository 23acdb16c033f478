"""Pretraining of METRO-LM encoders on megatron-core, from raw text to a Hugging Face model."""

from metro_megatron.hf.registration import register

__version__ = "0.1.0"

register()

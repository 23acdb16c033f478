"""Pretraining of several arms at equal FLOPs, run by run: make learn."""

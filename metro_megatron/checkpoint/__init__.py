"""Checkpoints: whole or not at all, free of the layout that wrote them."""

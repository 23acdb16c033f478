"""Many fine-tunings: grids, seeds and tasks, and what is made of them."""

"""Where the corrupted text comes from."""

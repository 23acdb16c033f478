"""The losses of a step, one file each: read term.py first, then terms.py, which says which of them a run has."""

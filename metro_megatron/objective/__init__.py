"""The losses of METRO-LM, each a sum that the caller divides by a count of the whole step."""

"""Where processes, groups and parameters are: layout, the two homes, the exchange, CPU support."""

"""What the benchmarks of the tools share."""

"""What is measured: operators, whole steps, data."""

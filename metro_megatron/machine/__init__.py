"""What a machine has, and what of it works: for tools/doctor.py."""

"""Everything a run can be told: its fields, its files, its mistakes."""

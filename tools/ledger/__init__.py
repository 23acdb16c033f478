"""make ledger: what the papers say, table by table, beside what this repository computes."""

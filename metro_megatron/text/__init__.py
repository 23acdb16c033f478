"""Reading text: files and globs, chunks, records, units."""

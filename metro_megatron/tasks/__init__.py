"""Making probing tasks of dictionaries, manuals and reviews."""

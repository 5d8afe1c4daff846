"""Studies: what an edit does, and which edit does it."""

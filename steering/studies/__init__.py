"""Studies: what an edit does, and which edit does it, measured on texts run through the model."""

"""What steering costs. ``python -m tests.bench`` runs a short set; each script explains itself."""

"""Presets: a steering spec behind a model's name, for clients that can name a model and no more."""

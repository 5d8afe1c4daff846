"""Sparse autoencoders: what one is, where it comes from, its arithmetic and its features.

Imports point one way, `server -> steering -> sae`: nothing here knows the engine.
"""

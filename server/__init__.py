"""The command line and the HTTP layer: vLLM's own API server, whose requests may steer.

Imports point one way, `server -> steering -> sae`.
"""

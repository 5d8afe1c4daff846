"""Runs in the front end: a request's ``steering`` field, from JSON to a plan. Free of vLLM."""

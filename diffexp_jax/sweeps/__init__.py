"""Experiments over seeds: what they consist of, what came out, and how results are compared."""

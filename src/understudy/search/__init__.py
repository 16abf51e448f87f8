"""Searches: which values are tried, in what order, and what came of them."""

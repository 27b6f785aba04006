"""Measures of how well predicted cells match real ones, each a function that can be called alone."""

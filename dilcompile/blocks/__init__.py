"""Blocks of pairs: their grid, patterns of them, and lists of those that are computed."""

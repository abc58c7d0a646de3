"""Lifetimes, places and budgets of the buffers of a graph."""

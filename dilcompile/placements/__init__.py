"""Placements: how keys come to queries where a sequence is held by several ranks. Never a change of the numbers."""

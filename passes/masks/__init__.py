"""Masks: read as formulas of one element, sorted into factors, emitted as vectors."""

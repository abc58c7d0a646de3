"""Rewritten attention beside the original one, on trial operands."""

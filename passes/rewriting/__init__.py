"""From decisions to the rewritten graph."""

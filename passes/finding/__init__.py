"""From a graph to its attention sites, and to misses with their reasons."""

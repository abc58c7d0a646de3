"""What a graph does along a sequence of which each rank holds a part."""

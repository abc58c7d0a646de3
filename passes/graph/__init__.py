"""What every pass needs of a graph: its operators, regions and provenance, nodes that are inserted and removed."""

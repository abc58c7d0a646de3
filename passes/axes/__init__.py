"""Which dim of a tensor is which: dims are tracked as atoms through views, products and broadcasts."""

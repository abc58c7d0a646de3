"""A relation's pieces as strided views, each by one dense attention op, merged by LSE."""

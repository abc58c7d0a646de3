"""Graph to graph: normalise, find the attention sites, read their masks, rewrite them."""

if __name__ == "passes":
    raise ImportError("import dilcompile.passes: this folder is part of the package dilcompile")

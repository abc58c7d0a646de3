"""Decision to kernel: the operators, the kernels and the choice between them."""

if __name__ == "lowering":
    raise ImportError("import dilcompile.lowering: this folder is part of the package dilcompile")

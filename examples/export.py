"""torch.export: rewrite the exported program with the same passes, run it, save it, and load it in another process.

python examples/export.py [--seq 1024] [--aoti]   (--aoti also compiles it ahead of time with Inductor: needs g++)
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from plain_pytorch import WrittenOut

import dilcompile

POLICY = str(Path(__file__).parent / "policy.yaml")
LOAD = """
import sys, torch, dilcompile
program = torch.export.load(sys.argv[1])
x, expected = torch.load(sys.argv[2])
torch.testing.assert_close(program.module()(x), expected)
print("another process loaded the saved program and got the same numbers")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--aoti", action="store_true", help="compile ahead of time with AOTInductor as well")
    options = parser.parse_args()
    torch.manual_seed(0)
    model, x = WrittenOut(128, 4).eval(), torch.randn(1, options.seq, 128)
    exported = torch.export.export(model, (x,))
    rewritten = dilcompile.rewrite_exported(exported, POLICY)
    with torch.no_grad():
        before, after = exported.module()(x), rewritten.module()(x)
    print(f"the output changes by {((after - before).norm() / before.norm()).item():.2e} of its norm")
    with tempfile.TemporaryDirectory() as folder:
        program, numbers = Path(folder, "program.pt2"), Path(folder, "numbers.pt")
        torch.export.save(rewritten, program)
        torch.save((x, after.detach()), numbers)
        subprocess.run([sys.executable, "-c", LOAD, str(program), str(numbers)], check=True)
        if options.aoti:
            package = torch._inductor.aoti_compile_and_package(rewritten, package_path=str(Path(folder, "ahead.pt2")))
            torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), after, rtol=1e-4, atol=1e-5)
            print("AOTInductor's package gives the same numbers")


if __name__ == "__main__":
    main()

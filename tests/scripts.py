"""Scripts in processes of their own that begin where torch is imported already: to import it takes longer than most of them.

This file is also the process that they are forked from: it has imported what it was told to, runs nothing, and has no threads.
"""

from __future__ import annotations

import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

TORCH = ("torch",)
# What torch imports when something is compiled or exported.
COMPILERS = ("torch", "torch._dynamo", "torch._inductor.compile_fx", "torch.export")


def run(
    script: str | Path,
    arguments: Sequence[str] = (),
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    imported: tuple[str, ...] = TORCH,
    timeout: float = 300.0,
) -> subprocess.CompletedProcess[str]:
    """What ``python script arguments``, or ``python -c script`` where it is a text, does from where ``imported`` are imported.

    Args:
        env: beside this process's environment. What torch reads when it is imported, it has read before.
        timeout: seconds.

    Raises:
        subprocess.TimeoutExpired: the script and all that it started in its group are ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("out", "err")]
        asked = {
            "path": str(script) if isinstance(script, Path) else None,
            "text": None if isinstance(script, Path) else script,
            "arguments": list(arguments),
            "cwd": str(cwd or Path.cwd()),
            "env": {**os.environ, **(env or {})},
            "outputs": [str(path) for path in outputs],
        }
        server = _server(imported)
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(asked).encode() + b"\n")
        child = int(server.stdout.readline())
        ended = bool(select.select([server.stdout], [], [], timeout)[0])
        if not ended:
            os.killpg(child, signal.SIGKILL)
        code = int(server.stdout.readline())
        out, err = (path.read_text() for path in outputs)
    if not ended:
        raise subprocess.TimeoutExpired(str(script), timeout, out, err)
    return subprocess.CompletedProcess([str(script), *arguments], code, out, err)


@cache
def _server(imported: tuple[str, ...]) -> subprocess.Popen[bytes]:
    """It ends when this process does: its input is closed then."""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, __file__, *imported], stdin=pipe, stdout=pipe, bufsize=0)


def _serve() -> dict[str, object]:
    """Fork for each line that comes, say the child's process and then its exit code; returns in the child."""
    while line := sys.stdin.buffer.raw.readline():  # type: ignore[attr-defined]
        ready, told = os.pipe()
        child = os.fork()
        if child == 0:
            os.setsid()
            os.close(told)
            os.close(ready)
            return dict(json.loads(line))
        os.close(told)
        # It is the leader of its group before anybody hears of it.
        os.read(ready, 1)
        os.close(ready)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


def _become(asked: dict[str, object]) -> str | None:
    """Take over the folder, environment, output and arguments; the path to run."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in enumerate(asked["outputs"], 1):  # type: ignore[arg-type]
        os.dup2(os.open(str(name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(str(asked["cwd"]))
    os.environ.clear()
    os.environ.update(asked["env"])  # type: ignore[call-overload]
    path = asked["path"]
    sys.argv = [str(path or "-c"), *asked["arguments"]]  # type: ignore[misc]
    sys.path[0] = str(Path(str(path)).parent) if path else ""
    return None if path is None else str(path)


if __name__ == "__main__":
    for module in sys.argv[1:]:
        __import__(module)
    given = _serve()
    script = _become(given)
    if script is None:
        sys.modules["__main__"] = main = ModuleType("__main__")
        exec(compile(str(given["text"]), "<string>", "exec"), main.__dict__)
    else:
        runpy.run_path(script, run_name="__main__")

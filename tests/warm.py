"""Run commands of the bundle in children of a process that has imported MONAI, which takes longer than most commands.

`python tests/warm.py` reads one command a line, forks, and answers with the exit status. The child is then what Python
makes of `python -m monai.bundle ...`: the same arguments, folder, environment and streams. Of the bundle nothing is
imported before.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory


class WarmPython:
    """A process that runs `python -m monai.bundle` again and again; one command at a time."""

    def __init__(self, env: Mapping[str, str]) -> None:
        env = {key: value for key, value in env.items() if key != "PYTHONPATH"}  # each command has its own
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, "-W", "ignore", __file__], env=env, **pipes)

    def run(self, arguments: Sequence[str], cwd: Path, env: Mapping[str, str]) -> subprocess.CompletedProcess:
        """What `subprocess.run` gives for `python -W ignore -m monai.bundle ARGUMENTS`, with its output as text."""
        with TemporaryDirectory() as folder:
            out, err = (os.path.join(folder, name) for name in ("out", "err"))
            command = {"arguments": arguments, "cwd": str(cwd), "env": dict(env), "out": out, "err": err}
            print(json.dumps(command), file=self.process.stdin, flush=True)
            status = int(self.process.stdout.readline())
            texts = (Path(path).read_text() for path in (out, err))
            return subprocess.CompletedProcess(arguments, status, *texts)


def serve() -> dict | None:
    """Fork for each command that comes in; the child returns it, the parent None when no more can come."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


def become(command: dict) -> None:
    """Let this process be as if Python had just been started for a command."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(command[name], os.O_WRONLY | os.O_CREAT), stream)
    os.environ.clear()
    os.environ.update(command["env"])
    os.chdir(command["cwd"])
    more = command["env"].get("PYTHONPATH")
    sys.path[:1] = [command["cwd"], *(more.split(os.pathsep) if more else [])]
    sys.argv = ["monai.bundle", *command["arguments"]]


if __name__ == "__main__":
    import monai.bundle  # noqa: F401

    command = serve()
    if command is not None:
        become(command)
        runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)

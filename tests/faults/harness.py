"""Runs commands of the bundle, lets things happen to them, and compares what they leave with an undisturbed run.

A command runs in a process of its own that is forked from one with PyTorch and MONAI loaded, since loading them takes
most of the time of a tiny run. From there on it is what `python -m monai.bundle` does. Its process can be killed at any
moment from outside, or kill itself just before its n-th change to the files in its output folder.
"""

from __future__ import annotations

import contextlib
import csv
import json
import multiprocessing
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, bundle_command

CHANGES = ("os.rename", "os.remove", "os.mkdir", "shutil.move", "shutil.copyfile")
LOADED = ["fire", "torch._dynamo", "monai.bundle", "monai.engines", "monai.handlers", "monai.inferers"]
LOADED += [
    f"scripts.{name}"
    for name in ("training.surge", "training.validation", "running.pictures", "diffusion.sampler", "data.inspect")
]
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]),
}
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(LOADED)


def command(argv: list[str], log: str, watched: str, die_at: int, changes: Any, clock: str | None) -> None:
    """In the forked process: run `python -m monai.bundle` and end as the interpreter would."""
    os.setsid()  # a group of its own, as a scheduler makes for a job
    os.chdir(ROOT)
    with open(log, "ab", 0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    process = os.getpid()

    def count(event: str, arguments: tuple) -> None:
        to_write = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if os.getpid() == process and (to_write or event in CHANGES) and str(arguments[0]).startswith(watched):
            changes.value += 1
            if changes.value == die_at:
                os.kill(process, signal.SIGKILL)

    sys.addaudithook(count)
    if clock == "jumping":
        jumps, now = random.Random(0), time.time
        time.time = lambda: now() + jumps.uniform(-1e7, 1e7)
    sys.argv = ["monai.bundle", *argv]
    sys.path.insert(0, str(ROOT))
    try:
        runpy.run_module("monai.bundle", run_name="__main__", alter_sys=True)
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        sys.stdout.flush()


class Run:
    """A command that has been started.

    Args:
        output: folder; what the command prints goes to a file beside it.
        words: after `python -m monai.bundle`.
        die_at: kill -9 just before this change to the files in `output`, counted from 1.
        clock: "jumping": the wall clock jumps by up to 116 days at each look.
    """

    def __init__(self, output: Path, words: list[str], die_at: int = 0, clock: str | None = None) -> None:
        self.output, self.log = output, output.with_name(f"{output.name}.log")
        self.before = self.log.stat().st_size if self.log.exists() else 0
        self.changes = processes.Value("i", 0)
        arguments = (words, str(self.log), str(output), die_at, self.changes, clock)
        self.process = processes.Process(target=command, args=arguments)
        self.process.start()

    def text(self) -> str:
        """What it has printed."""
        with open(self.log, errors="replace") as file:
            file.seek(self.before)
            return file.read()

    def wait(self) -> int:
        """Its exit status; that of a signal is negative."""
        self.process.join(300)
        assert self.process.exitcode is not None, f"still running:\n{self.text()[-3000:]}"
        return self.process.exitcode

    def send(self, number: int, group: bool = False) -> None:
        if group:
            with contextlib.suppress(ProcessLookupError):  # in its first moments it has no group of its own yet
                return os.killpg(self.process.pid, number)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)

    def until(self, happened: Any) -> None:
        """Wait until something has happened, or the process has ended."""
        while not happened() and self.process.is_alive():
            time.sleep(0.005)


def start(output: Path, *verb: str, die_at: int = 0, clock: str | None = None, **knobs: Any) -> Run:
    """Start `python -m monai.bundle VERB --key value ...`, which writes in `output`."""
    words = bundle_command(*verb, **knobs)
    return Run(output, words[words.index("monai.bundle") + 1 :], die_at, clock)


def sentence(run: Run) -> str:
    """What a refused or failed command says; it must not show a traceback."""
    status, text = run.wait(), run.text()
    assert status == 1 and "Traceback" not in text and "error: " in text, f"{status}\n{text[-3000:]}"
    return text[text.index("error: ") :].strip()


def rows(path: Path) -> list[dict[str, str]]:
    with contextlib.suppress(FileNotFoundError), open(path, newline="") as file:
        return list(csv.DictReader(file))
    return []


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two nested structures of tensors, numbers and words differ in any bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [where]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [d for key in one for d in differences(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        return [d for i, (a, b) in enumerate(zip(one, other)) for d in differences(a, b, f"{where}/{i}")]
    return [] if one == other else [where]


def lost(output: Path, reference: Path) -> list[str]:
    """What a finished training does not have as the undisturbed one has it: nothing, if all is well."""
    texts = ["loss.csv", "validation.csv", "surges.csv", "dataset.json", "models/model.json"]
    found = [name for name in texts if (output / name).read_text() != (reference / name).read_text()]
    newest = max(path.name for path in (reference / "models").glob("checkpoint_*.pt"))
    for name in ("models/model.pt", f"models/{newest}"):
        ours, theirs = (torch.load(folder / name, weights_only=True) for folder in (output, reference))
        found += differences(ours, theirs, name)
    pictures = {p.relative_to(reference) for p in reference.rglob("*.png")}
    found += [str(name) for name in pictures if not (output / name).stat().st_size]
    return found + [str(path) for path in output.rglob("*.partial")]


@contextlib.contextmanager
def small_disk(path: Path, size: str) -> Iterator[SimpleNamespace]:
    """A tmpfs of `size`, such as "2m"; `remount(options)` changes it. Skips the test where it cannot be mounted."""
    path.mkdir(parents=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", path], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.strip()}")
    try:
        yield SimpleNamespace(
            remount=lambda options: subprocess.run(["mount", "-o", f"remount,{options}", path], check=True)
        )
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def table(path: str | None, title: str, lines: list[dict[str, Any]]) -> None:
    """Append what was done to a JSON-lines file, if the environment names one (FAULT_TABLE)."""
    if path:
        with open(path, "a") as file:
            file.writelines(json.dumps({"what": title} | line) + "\n" for line in lines)


def checkpoint_iterations(folder: Path) -> list[int]:
    names = [re.fullmatch(r"checkpoint_(\d+)\.pt", path.name) for path in folder.glob("*")]
    return sorted(int(name.group(1)) for name in names if name)

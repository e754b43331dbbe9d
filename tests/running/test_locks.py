"""Two runs never write in one folder."""

import multiprocessing
import os
import signal
import socket
import subprocess
import sys

import pytest
from conftest import ROOT

from scripts.running import locks
from scripts.running.errors import BundleError
from scripts.running.locks import lock_folders

HOLDER = (
    "import os, sys, time; from scripts.running.locks import lock_folders; lock_folders(output_dir=sys.argv[1]); "
    "child = os.fork(); child and print(child, flush=True); time.sleep(600)"
)


@pytest.fixture(autouse=True)
def free():
    yield
    [lock.release() for lock in locks.LOCKS.values()]
    locks.LOCKS.clear()


@pytest.fixture
def another_run(tmp_path):
    """A process that holds tmp_path and has a child, as a training has loader workers."""
    command = [sys.executable, "-c", HOLDER, tmp_path]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)
    child = int(process.stdout.readline())  # it has copies of its parent's open files
    yield process
    process.kill()
    os.kill(child, signal.SIGKILL)


def test_the_second_run_is_told_who_holds_the_folder_and_goes_on_once_that_is_killed(tmp_path, another_run):
    with pytest.raises(BundleError) as e:
        lock_folders(output_dir=str(tmp_path))
    said = str(e.value)
    assert said.startswith("output_dir: ") and repr(str(tmp_path)) in said
    assert f"process {another_run.pid} on {socket.gethostname()}" in said
    another_run.send_signal(signal.SIGKILL)
    another_run.wait()
    lock_folders(output_dir=str(tmp_path))
    assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_one_run_may_name_a_folder_twice_and_again(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path)
    for _ in range(2):
        lock_folders(output_dir=str(tmp_path), ckpt_dir=str(tmp_path / "link"))
    assert len(locks.LOCKS) == 1


def test_what_a_killed_run_left_half_written_is_removed_and_nothing_else(tmp_path):
    for name in ("model.pt.partial", "model.pt", "partial"):
        (tmp_path / name).write_text("")
    lock_folders(ckpt_dir=str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == [".lock", "model.pt", "partial"]


def attempt(folder, queue):
    try:
        lock_folders(output_dir=folder)
        queue.put("held")
    except BundleError:
        queue.put("refused")


def test_the_lock_is_held_while_this_process_lives(tmp_path):
    lock_folders(output_dir=str(tmp_path))
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=attempt, args=(str(tmp_path), queue))
    process.start()
    assert queue.get() == "refused"
    process.join()

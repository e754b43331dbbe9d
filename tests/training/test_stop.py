"""When a training stops early: on which signal, after which iteration, with how much time left, in many processes."""

import multiprocessing
import os
import signal
import socket
import time

import pytest
import torch
import torch.distributed as dist
from ignite.engine import Engine

from scripts.running import signals
from scripts.running.errors import LoaderDied
from scripts.training import stop as stopping
from scripts.training.checkpoints import CheckpointHandler
from scripts.training.records import TrainingRecords
from scripts.training.stop import Stop


class Clock:
    """A monotonic clock that is set by hand."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(stopping.time, "monotonic", lambda: self.now)


def run(folder, stop, at_iteration, iterations=100, interval=1000):
    """Run a trainer that calls `at_iteration` within each iteration; returns the exit status, and where it stopped."""
    network = torch.nn.Linear(1, 1)
    parts = {"network": network, "ema": network, "optimizer": torch.optim.SGD(network.parameters(), 0.1)}
    checkpoints = CheckpointHandler(str(folder), parts, interval, 3, {}, TrainingRecords(str(folder)))
    trainer = Engine(lambda engine, batch: at_iteration(engine.state.iteration))
    checkpoints.attach(trainer)
    with stop.watch(trainer, checkpoints):
        try:
            trainer.run(range(iterations), max_epochs=1)
        except SystemExit as e:
            return e.code, trainer.state.iteration
    return 0, trainer.state.iteration


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("accumulation_steps, last", [(1, 5), (4, 8)])
def test_a_signal_stops_after_the_step_with_a_checkpoint(tmp_path, number, status, accumulation_steps, last):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    stop = Stop(None, time.monotonic(), accumulation_steps)
    said = run(tmp_path, stop, lambda i: os.kill(os.getpid(), number) if i == 5 else None)
    assert said == (status, last)
    assert torch.load(tmp_path / f"checkpoint_{last:08d}.pt", weights_only=True)["iteration"] == last
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


@pytest.mark.parametrize("after, ends", [(0.1, False), (2, True)])
def test_a_second_ctrl_c_stops_at_once_unless_a_launcher_passed_the_first_one_on(tmp_path, monkeypatch, after, ends):
    clock, reached = Clock(monkeypatch), []

    def press_twice(iteration):
        for seconds in (0, after):
            clock.now += seconds
            signal.raise_signal(signal.SIGINT)
        reached.append(iteration)

    if ends:
        with pytest.raises(KeyboardInterrupt, match="--resume true"):
            run(tmp_path, Stop(None, clock.now), press_twice)
        assert not reached and not list(tmp_path.glob("*.pt"))
    else:
        assert run(tmp_path, Stop(None, clock.now), press_twice) == (130, 1)


def test_a_second_sigterm_changes_nothing(tmp_path, monkeypatch):
    clock = Clock(monkeypatch)

    def twice(iteration):
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
            clock.now += 60

    assert run(tmp_path, Stop(None, clock.now), twice) == (143, 1)


@pytest.mark.parametrize("iteration", [1, 5])
def test_a_signal_that_also_ends_a_loader_process_is_still_a_stop(tmp_path, caplog, iteration):
    def both(i):
        if i == iteration:
            signal.raise_signal(signal.SIGTERM)
            raise LoaderDied("num_workers: a loader process has died")

    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, Stop(None, time.monotonic()), both, interval=2)
    assert stopped.value.code == 143
    newest = tmp_path / "checkpoint_00000004.pt"
    kept = f"{newest} holds everything up to iteration 4" if iteration == 5 else "there was nothing to keep yet"
    assert kept in caplog.text


def test_a_loader_process_that_dies_by_itself_is_an_error(tmp_path):
    def die(i):
        raise LoaderDied("num_workers: a loader process has died")

    with pytest.raises(LoaderDied):
        run(tmp_path, Stop(None, time.monotonic()), die)


def test_the_time_limit_leaves_room_for_the_longest_iteration_so_far(tmp_path, monkeypatch):
    """10 s an iteration, 100 s the third, limit 300 s: it ends after 200 s, since another 100 s might follow."""
    clock = Clock(monkeypatch)

    def work(iteration):
        clock.now += 100 if iteration == 3 else 10

    status, last = run(tmp_path, Stop(5, clock.now), work)
    spent = clock.now - 1000
    assert (status, last, spent) == (75, 11, 200)
    assert run(tmp_path, Stop(None, clock.now), work) == (0, 100)


def one_of_two(rank, port, folder, results):
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)

    def signal_one(iteration):
        if rank == 1 and iteration == 7:
            signal.raise_signal(signal.SIGTERM)

    results.put((rank, *run(folder, Stop(None, 0), signal_one)))


def test_processes_stop_after_the_same_iteration_if_one_of_them_is_told(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    both = [context.Process(target=one_of_two, args=(rank, port, tmp_path, results)) for rank in (0, 1)]
    for process in both:
        process.start()
    assert sorted(results.get(timeout=120) for _ in both) == [(0, 143, 7), (1, 143, 7)]
    for process in both:
        process.join()
    assert [path.name for path in tmp_path.glob("checkpoint_*")] == ["checkpoint_00000007.pt"]


def test_workers_of_a_loader_leave_signals_to_the_training_and_end_when_it_says_so():
    context = multiprocessing.get_context("fork")
    said = context.Queue()

    def worker():
        signals.worker_init_fn = lambda worker_id: None
        signals.leave_signals_to_parent(0)
        said.put("ready")
        time.sleep(600)

    process = context.Process(target=worker)
    process.start()
    assert said.get(timeout=60) == "ready"
    for number in ("INT", "TERM"):
        os.system(f"kill -{number} {process.pid}")  # from another process than its parent
    process.join(0.5)
    assert process.is_alive()
    process.terminate()
    process.join()
    assert process.exitcode == 0

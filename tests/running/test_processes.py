"""Two processes of torchrun, on the CPU, against one: the same losses, weights and volumes."""

import json
import subprocess
import sys
from pathlib import Path

import ignite.distributed as idist
import pytest
import torch
from conftest import ROOT, TINY_NETWORK, run_two, sample, table, train, train_two

from scripts.running import processes as distributed
from scripts.running.errors import BundleError
from scripts.scans.draws import DrawSampler, RepeatSampler

# what a job of SLURM has in its environment, whose ranks are those of the launchers
SLURM = dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_NUM_NODES"), "0") | {
    "SLURM_JOB_ID": "7",
    "SLURM_NTASKS": "1",
    "SLURM_JOB_NODELIST": "node1",
}


@pytest.fixture(scope="module")
def trained(cohort, tmp_path_factory) -> Path:
    """A run of one process, in float32: in bfloat16 the same sums in another order differ in the fifth digit."""
    output = tmp_path_factory.mktemp("one")
    done = train(cohort, output, amp="float32")
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="module")
def trained_by_two(cohort, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("two")
    done = train_two(cohort, output, env=SLURM, amp="float32")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out loss") == 4 and done.stdout.count("2 processes (gloo)") == 1
    assert done.stderr.count("training:   0%") == 1
    return output


def test_two_processes_train_as_one_does(trained, trained_by_two):
    for name in ("loss.csv", "validation.csv"):
        rows, expected = table(trained_by_two / name), table(trained / name)
        assert [row["iteration"] for row in rows] == [row["iteration"] for row in expected]
        for row, other in zip(rows, expected):
            losses = {key: float(value) for key, value in row.items() if key.startswith("loss")}
            assert losses == pytest.approx({key: float(other[key]) for key in losses}, abs=1e-5)
    weights, expected = (torch.load(folder / "models/model.pt") for folder in (trained_by_two, trained))
    assert list(weights) == list(expected)  # no "module."
    # a bias before a normalisation has no gradient but rounding, of which Adam makes steps: not each weight is close
    first, second = (torch.cat([w.flatten() for w in state.values()]) for state in (weights, expected))
    assert (first - second).norm() < 1e-4 * second.norm()


def test_rank_0_alone_writes(trained, trained_by_two):
    def files(folder):
        found = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and p.name != ".torchrun")
        return sorted(str(p) for p in found if p.parent.name != "tensorboard")

    assert files(trained_by_two) == files(trained)
    assert len(list((trained_by_two / "tensorboard").iterdir())) == 1
    assert (
        json.loads((trained_by_two / "dataset.json").read_text()).keys()
        == json.loads((trained / "dataset.json").read_text()).keys()
    )


def test_two_processes_write_the_volumes_and_the_picture_of_one(trained, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    done = sample(trained / "models/model.pt", one, num_samples=3)
    assert done.returncode == 0, done.stderr
    places = {"config_file": "configs/inference.json", "ckpt_path": trained / "models/model.pt", "output_dir": two}
    done = run_two("run", overlays=["configs/multi_gpu_inference.json"], num_samples=3, **TINY_NETWORK | places)
    assert done.returncode == 0, done.stderr
    names = sorted(p.name for p in one.iterdir() if p.name[0] != ".")
    assert names == sorted(p.name for p in two.iterdir() if p.name[0] != ".") and len(names) == 5  # with samples.json
    for name in names:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


@pytest.fixture
def as_rank(monkeypatch):
    """Let this process be one of several."""

    def pretend(rank, size):
        monkeypatch.setattr(idist, "get_rank", lambda: rank)
        monkeypatch.setattr(idist, "get_world_size", lambda: size)

    return pretend


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_batch_has_the_same_draws_whatever_the_number_of_processes(size, as_rank):
    dataset, batch_size = range(5), 6
    sampler = DrawSampler(dataset, batch_size, seed=3)
    sampler.iteration = 2
    expected = [draw for draw, _ in zip(sampler, range(18))]
    assert [draw for _, draw in expected] == list(range(12, 30))
    batches = [[], [], []]
    for rank in range(size):
        as_rank(rank, size)
        stream = iter(sampler)
        for batch in batches:
            batch += [next(stream) for _ in range(batch_size // size)]
    assert [sorted(batch, key=lambda pair: pair[1]) for batch in batches] == [expected[i : i + 6] for i in (0, 6, 12)]


@pytest.mark.parametrize("count, size", [(3, 1), (3, 2), (1, 8)])
def test_every_process_looks_at_as_many_held_out_draws(count, size, as_rank):
    sampler = RepeatSampler(range(count), repeats=4)
    found = []
    for rank in range(size):
        as_rank(rank, size)
        mine = list(sampler)
        assert len(mine) == len(sampler) == -(-count * 4 // size)
        found += mine
    assert set(found) == {(draw // 4, draw) for draw in range(count * 4)}


@pytest.mark.parametrize("count", [0, 1, 5, 6])
def test_shares_come_back_in_order(count, as_rank):
    shares = []
    for rank in range(3):
        as_rank(rank, 3)
        shares.append(distributed.share(range(count)))
    assert distributed.in_turn(shares) == list(range(count))


def test_batches_that_cannot_be_shared_are_refused(as_rank):
    as_rank(0, 3)
    distributed.check_shared_evenly(batch_size=6)
    with pytest.raises(BundleError, match="batch_size: 4 was given, which 3 processes .* such as 6"):
        distributed.check_shared_evenly(batch_size=4)


def test_without_torchrun_the_overlays_say_so(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(BundleError, match="torchrun --standalone --nproc_per_node=2 -m monai.bundle run"):
        distributed.local_device()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(BundleError, match="process 3 of a machine that has 2 GPUs"):
        distributed.local_device()
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.local_device() == torch.device("cuda:1")


def test_several_machines_with_one_store_are_refused_to_start_anew(monkeypatch):
    told = {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for key, value in (told | {"GROUP_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "1"}).items():
        monkeypatch.setenv(key, value)
    with pytest.raises(BundleError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        distributed.connection()


def test_a_launch_is_known_by_its_id(monkeypatch, tmp_path):
    assert not distributed.started_anew(str(tmp_path))  # not by torchrun
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 7")
    assert not distributed.started_anew(str(tmp_path))
    distributed.note_launch(str(tmp_path))
    assert distributed.started_anew(str(tmp_path))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job 8")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not distributed.started_anew(str(tmp_path))  # it failed before its training began
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert distributed.started_anew(str(tmp_path))


LOOK_AND_END = """
import atexit, sys
import torch.distributed as dist
from scripts.running.processes import Guard
server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
guard = Guard(lambda: dist.TCPStore("localhost", server.port, is_master=False), 0, sys.excepthook)
wait, guard.ending.wait = guard.ending.wait, lambda s: wait(0 if s == 1 else s)  # it looks all the time
atexit.register(guard.end)
if len(sys.argv) > 1:
    sys.excepthook = guard
    raise RuntimeError("an error")
"""


@pytest.mark.parametrize("arguments, status", [([], 0), (["error"], 1)])
def test_a_process_that_is_looked_after_ends_with_its_own_status(arguments, status):
    """A thread that is in the store's C++ when Python ends would abort it."""
    command = [sys.executable, "-W", "ignore", "-c", LOOK_AND_END, *arguments]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert done.returncode == status, done.stderr
    assert ("error: rank 0 failed: RuntimeError: an error" in done.stderr) == bool(status)

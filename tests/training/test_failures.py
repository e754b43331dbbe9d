"""What ends a training, each in the trainer that train.json builds: memory, loader processes, files, and all else."""

import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch
from conftest import OUT_OF_MEMORY, OUT_OF_MEMORY_SHORT, preprocessing, workflow
from ignite.engine import Engine, Events
from monai.engines import IterationEvents

from scripts.running.errors import BundleError, LoaderDied, root_bundle_error
from scripts.scans.datasets import VolumeDataset
from scripts.training.failures import Failures

KNOBS = {
    "batch_size": 4,
    "spatial_shape": [128, 128, 128],
    "amp": "float32",
    "activation_checkpointing": "none",
    "accumulation_steps": 1,
}


def out_of_memory():
    raise torch.OutOfMemoryError(OUT_OF_MEMORY)


def tracker_is_gone():
    raise ConnectionResetError(104, "the tracker has closed the connection")


def kill_loaders():
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)


def ended(run):
    """The error that a training comes to a user as, and its first cause: MONAI wraps what a config raises."""
    with pytest.raises(Exception) as caught:
        run()
    error = caught.value
    while error.__cause__ is not None and not isinstance(error, BundleError):
        error = error.__cause__
    return root_bundle_error(caught.value) or error


@pytest.mark.parametrize(
    "event, what, kind, words",
    [
        (
            IterationEvents.LOSS_COMPLETED,
            out_of_memory,
            BundleError,
            f"out of GPU memory at iteration 2 .*{OUT_OF_MEMORY_SHORT}",
        ),
        (Events.ITERATION_COMPLETED, out_of_memory, BundleError, "--batch_size 1 --accumulation_steps 2"),
        (Events.ITERATION_STARTED, kill_loaders, LoaderDied, "num_workers: a loader process has died .*if nobody"),
        (Events.ITERATION_COMPLETED, tracker_is_gone, ConnectionResetError, "the tracker has closed"),
    ],
    ids=["memory in the pass", "memory after it", "loader killed", "tracker gone"],
)
def test_the_trainer_that_ships_says_what_has_failed(cohort, tmp_path, event, what, kind, words):
    knobs = {"max_iterations": 40, "checkpoint_interval": 40, "num_workers": 1 if what is kill_loaders else 0}
    run = workflow("train", tmp_path, dataset_dir=str(cohort), **knobs)
    trainer = run.parser.get_parsed_content("train#trainer")
    trainer.add_event_handler(event, lambda engine: what() if engine.state.iteration == 2 else None)
    assert len(trainer._event_handlers[Events.EXCEPTION_RAISED]) == 1  # Ignite calls the first that raises
    error = ended(run.run)
    assert type(error) is kind
    with pytest.raises(kind, match=words):
        raise error


def failing(error, step=None, amp_dtype=None, **knobs):
    """What comes out of a trainer whose third iteration raises an error."""

    def fail(engine, batch):
        if engine.state.iteration == 3:
            raise error

    trainer = Engine(step or fail)
    trainer.logger.setLevel("CRITICAL")
    Failures(KNOBS | knobs, amp_dtype).attach(trainer)
    with pytest.raises(Exception) as caught:
        trainer.run(range(5))
    return caught.value


def test_training_says_what_to_change_and_does_not_name_what_is_done_already():
    error = failing(torch.OutOfMemoryError(OUT_OF_MEMORY))
    assert isinstance(error, BundleError)
    said = str(error)
    assert f"at iteration 3 of the training ({OUT_OF_MEMORY_SHORT})" in said and "spatial_shape [128, 128, 128]" in said
    for advice in ("--batch_size 2 --accumulation_steps 2", "--activation_checkpointing all", "--amp auto"):
        assert advice in said
    done = {"batch_size": 1, "activation_checkpointing": "all", "amp_dtype": torch.bfloat16, "accumulation_steps": 4}
    said = str(failing(torch.OutOfMemoryError(OUT_OF_MEMORY), **done))
    assert "amp bfloat16" in said and "--" not in said and "a smaller spatial_shape" in said
    assert "(HIP out of memory)" in str(failing(torch.OutOfMemoryError("HIP out of memory. More words.")))


@pytest.mark.parametrize(
    "error",
    [
        ValueError("something else"),
        RuntimeError("CUDA is not happy"),
        ConnectionResetError(104, "Connection reset by peer"),  # not within a data loader
        EOFError(),
        OSError(28, "No space left on device"),
    ],
)
def test_other_errors_of_a_training_stay_what_they_are(error):
    assert failing(error) is error


@pytest.mark.parametrize(
    "words",
    ["DataLoader worker (pid 4711) is killed by signal: Killed. ", "DataLoader worker (pid(s) 4711, 4712) exited"],
)
def test_what_torch_raises_anywhere_when_a_loader_process_dies_is_said(words):
    assert "a loader process has died (DataLoader worker" in str(failing(RuntimeError(words)))


class Broken(torch.utils.data.Dataset):
    """Whose process ends the connection through which its batch was on its way."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.zeros(1)


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), EOFError()])
def test_a_connection_that_ends_within_the_loader_is_a_dead_process(error, monkeypatch):
    loader = torch.utils.data.DataLoader(Broken(), num_workers=1)

    def cut(*_, **__):
        raise error

    monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, "_try_get_data", cut)
    trainer = Engine(lambda engine, batch: None)
    trainer.logger.setLevel("CRITICAL")
    Failures(KNOBS, None).attach(trainer)
    with pytest.raises(LoaderDied, match="num_workers: a loader process has died .*; if nobody stopped it, memory"):
        trainer.run(loader)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_torn_file_ends_a_training_with_one_sentence(num_workers, cohort, tmp_path):

    torn = tmp_path / "torn.nii.gz"
    torn.write_bytes(Path(next(cohort.glob("*.nii.gz"))).read_bytes()[:300])
    dataset = VolumeDataset([{"image": str(torn)}], preprocessing(), None, "none")
    trainer = Engine(lambda engine, batch: None)
    trainer.logger.setLevel("CRITICAL")
    Failures(KNOBS, None).attach(trainer)
    with pytest.raises(BundleError) as error:
        trainer.run(torch.utils.data.DataLoader(dataset, num_workers=num_workers))
    assert str(error.value).startswith(f"'{torn}' cannot be read now (EOFError: ") and "\n" not in str(error.value)

"""Sampling that is killed, stopped, started twice, or has no room: every volume is whole, and the run goes on."""

import gzip
import io
import json
import os
import random
import signal
import subprocess
import time

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import TINY_NETWORK, small_unet
from harness import sentence, start
from PIL import Image

SAMPLES = 12
KNOBS = TINY_NETWORK | {
    "config_file": "configs/inference.json",
    "num_samples": SAMPLES,
    "batch_size": 3,
    "num_inference_steps": 8,
    "resume": "true",
}


@pytest.fixture(scope="module")
def ckpt_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(small_unet().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def undisturbed(ckpt_path, tmp_path_factory):
    output = tmp_path_factory.mktemp("undisturbed") / "samples"
    run = start(output, "run", **KNOBS, ckpt_path=ckpt_path, output_dir=output)
    assert run.wait() == 0, run.text()
    assert len(volumes(output)) == SAMPLES
    return output


def volumes(output):
    """{name: affine and voxels} of every file under its final name, read to the end, where its checksum is."""
    found = {}
    for path in output.glob("*.nii.gz"):
        image = nib.Nifti1Image.from_bytes(gzip.decompress(path.read_bytes()))
        found[path.name] = image.affine.tobytes() + np.asarray(image.dataobj).tobytes()
    return found


def picture(path):
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        return np.asarray(image)


def wrong(output, undisturbed):
    """Files under their final names that are not whole, or not what the undisturbed run has written."""
    theirs = volumes(undisturbed)
    found = [name for name, content in volumes(output).items() if theirs[name] != content]
    for name, read in (
        ("mosaic.png", lambda p: picture(p).tolist()),
        ("samples.json", lambda p: json.loads(p.read_text())),
    ):
        if (output / name).exists() and read(output / name) != read(undisturbed / name):
            found.append(name)
    return found


def kill_again_and_again(kills, seed, undisturbed, ckpt_path, folder):
    """Kill -9 runs that each go on where the one before was killed; whenever all is there, begin anew elsewhere.

    Half of the kills come after a random time, half just before a random one of the changes to the files.

    Returns:
        rows (volumes before the kill, volumes after, what came, partial files left, wrong files).
    """
    moments, table, number = random.Random(seed), [], 0
    while len(table) < kills:
        output = folder / str(number)
        before = len(list(output.glob("*.nii.gz")))
        at_change = moments.randint(1, 25) if moments.random() < 0.5 else 0
        run = start(output, "run", die_at=at_change, **KNOBS, ckpt_path=ckpt_path, output_dir=output)
        if not at_change:
            enough = before + moments.choice((0, 0, 1, 2, 4))
            run.until(lambda output=output, enough=enough: len(list(output.glob("*.nii.gz"))) >= enough)
            time.sleep(moments.uniform(0, 4 if enough == before else 0.1))
            run.send(signal.SIGKILL)
        status = run.wait()
        assert status in (0, -signal.SIGKILL), run.text()
        after, partial = len(volumes(output)), len(list(output.rglob("*.partial")))
        assert wrong(output, undisturbed) == []
        if status:
            table.append((before, after, f"change {at_change}" if at_change else "time", partial))
        else:
            complete(output, undisturbed)
            number += 1
    run = start(output, "run", **KNOBS, ckpt_path=ckpt_path, output_dir=output)
    assert run.wait() == 0, run.text()
    complete(output, undisturbed)
    return table


def complete(output, undisturbed):
    assert wrong(output, undisturbed) == []
    assert sorted(os.listdir(output)) == sorted(os.listdir(undisturbed))  # nothing is missing, nothing left over


def test_killed_sampling_goes_on_to_the_same_volumes(undisturbed, ckpt_path, tmp_path):
    kill_again_and_again(2, 0, undisturbed, ckpt_path, tmp_path)


@pytest.mark.slow
def test_sampling_killed_20_times_goes_on_to_the_same_volumes(undisturbed, ckpt_path, tmp_path):
    table = kill_again_and_again(20, 1, undisturbed, ckpt_path, tmp_path)
    print("\nvolumes before | after | killed at | partial files")
    print("\n".join(" | ".join(map(str, row)) for row in table))


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_at_once_and_it_says_how_to_go_on(ckpt_path, tmp_path, number, status):
    output = tmp_path / "samples"
    knobs = KNOBS | {"num_samples": 500, "batch_size": 1}
    run = start(output, "run", **knobs, ckpt_path=ckpt_path, output_dir=output)
    run.until(lambda: len(list(output.glob("*.nii.gz"))) >= 2)
    run.send(number)
    assert run.wait() == status, run.text()
    there = volumes(output)
    assert 2 <= len(there) < 500 and not list(output.glob("*.partial"))
    assert f"{len(there)} of 500 volumes are in {str(output)!r}" in run.text() and "--resume true" in run.text()
    assert "Traceback" not in run.text()


def test_a_second_run_in_the_folder_is_told_and_the_first_is_not_disturbed(undisturbed, ckpt_path, tmp_path):
    output = tmp_path / "samples"
    first = start(output, "run", **KNOBS, ckpt_path=ckpt_path, output_dir=output)
    first.until(lambda: list(output.glob("*.nii.gz")))
    first.send(signal.SIGSTOP)
    said = sentence(start(tmp_path / "samples", "run", **KNOBS, ckpt_path=ckpt_path, output_dir=output))
    first.send(signal.SIGCONT)
    assert "output_dir: another run is writing" in said and f"process {first.process.pid}" in said
    assert first.wait() == 0
    complete(output, undisturbed)


@pytest.fixture
def small_disk(tmp_path):
    """A tmpfs of 128 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip("needs root and the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_said_and_the_volumes_before_it_stay(undisturbed, ckpt_path, small_disk):
    output = small_disk / "samples"
    run = start(small_disk.parent / "log", "run", **KNOBS, ckpt_path=ckpt_path, output_dir=output)
    said = sentence(run)
    assert "could not be written" in said and "No space left on device" in said
    assert "--resume true goes on" in run.text()
    there = len(volumes(output))
    assert 0 < there < SAMPLES and wrong(output, undisturbed) == [] and not list(output.glob("*.partial"))
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    run = start(small_disk.parent / "log", "run", **KNOBS, ckpt_path=ckpt_path, output_dir=output)
    assert run.wait() == 0 and f"{there} of {SAMPLES} volumes are there" in run.text(), run.text()
    complete(output, undisturbed)


def test_a_folder_that_is_read_only_is_said_before_anything_is_sampled(ckpt_path, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    said = sentence(start(small_disk.parent / "log", "run", **KNOBS, ckpt_path=ckpt_path, output_dir=small_disk))
    assert "output_dir: nothing can be written" in said and "Read-only file system" in said

"""Which scans are heads, and the masks of their brains: kept, shared, and whole whatever happens."""

import csv
import os
import signal
import subprocess
import time
from importlib.util import find_spec

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, bundle_command, preprocessing, run_two, train
from scipy.ndimage import label

from scripts.evaluation.cohorts import load_cohorts
from scripts.running.errors import BundleError
from scripts.scans import brains
from scripts.scans.brains import is_head, kept_mask, with_brains

# a stand-in for deepbet: the bright ball in a scan is its brain; each call is noted, with its process
STAND_IN = """
import os, time
import nibabel as nib, numpy as np
class BrainExtraction:
    def __init__(self, no_gpu): pass
    def run(self, image):
        time.sleep(float(os.environ.get("SECONDS_A_SCAN", 0)))
        voxels = np.asarray(image.dataobj)
        mask = voxels > 150
        with open(os.environ["CALLS"], "a") as file:
            file.write(f"{os.getpid()} {round(voxels.sum())}\\n")
        return None, nib.Nifti1Image(mask.astype(np.uint8), image.affine), None
"""


def ball(shape=(24, 26, 22), radius=8.0):
    grid = np.stack(np.meshgrid(*(np.arange(side) - side / 2 for side in shape), indexing="ij"))
    return (grid**2).sum(0) < radius**2


def write(path, voxels, spacing=8.0):
    nib.save(nib.Nifti1Image(voxels, np.diag([spacing, spacing, spacing, 1])), path)
    return str(path)


def head(seed):
    """A ball, the brain, in a larger one, the head, in air with noise."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 8, (24, 26, 22))
    return (noise + 80 * ball(radius=10.5) + (100 + seed) * ball(radius=8 - 0.1 * seed)).astype(np.int16)


@pytest.fixture
def heads(tmp_path):
    (tmp_path / "raw").mkdir()
    return [write(tmp_path / f"raw/sub-{i:02d}.nii.gz", head(i)) for i in range(6)]


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Programs that are started find the stand-in in place of deepbet; gives the file that its calls are noted in."""
    (tmp_path / "modules/deepbet").mkdir(parents=True)
    (tmp_path / "modules/deepbet/__init__.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return tmp_path / "calls"


def calls(path):
    return [line.split() for line in path.read_text().splitlines()]


def test_a_scan_is_a_head_where_air_is_noisy_or_where_it_is_larger_than_a_brain(tmp_path):
    brain = np.where(ball(), 100 + np.arange(22), 0).astype(np.int16)  # 8^3 voxels of 8 mm: 1.1 L
    assert is_head(write(tmp_path / "head.nii", head(0)))
    assert not is_head(write(tmp_path / "brain.nii", brain))
    assert not is_head(write(tmp_path / "brain4d.nii", brain[..., None].astype(np.float32)))
    assert is_head(write(tmp_path / "defaced.nii", brain, spacing=10.0))  # 2.1 L in an even background
    assert not is_head(write(tmp_path / "z_scores.nii", np.where(ball(), (np.arange(22) - 10) / 5, 0)))


def test_a_brain_passes_untouched_and_a_head_gets_a_mask_once(tmp_path, heads, monkeypatch):
    made = []

    def brain_mask(path):
        made.append(path)
        return nib.Nifti1Image((np.asarray(nib.load(path).dataobj) > 150).astype(np.uint8), np.eye(4))

    monkeypatch.setattr(brains, "brain_mask", brain_mask)
    monkeypatch.setattr(brains, "find_spec", lambda name: True)
    brain = write(tmp_path / "brain.nii.gz", np.where(ball(), 100 + np.arange(22), 0).astype(np.int16))
    given = {"image": str(tmp_path / "raw/sub-05.nii.gz"), "mask": "its own"}
    images = [{"image": heads[0], "class_label": 1}, {"image": brain}, given, {"image": heads[1]}]
    masks = str(tmp_path / "masks")
    found = with_brains(images, "auto", masks)
    assert found[1:3] == [{"image": brain}, given]
    assert found[0] == {"image": heads[0], "class_label": 1, "mask": found[0]["mask"]}
    assert made == [heads[0], heads[1]] and found == with_brains(images, "auto", masks) and len(made) == 2
    copy = tmp_path / "copy.nii.gz"
    copy.write_bytes((tmp_path / "raw/sub-00.nii.gz").read_bytes())
    assert kept_mask(str(copy), masks) == found[0]["mask"] and len(made) == 2  # by content
    mask = nib.load(found[0]["mask"])
    assert mask.get_data_dtype() == np.uint8 and np.array_equal(mask.get_fdata() > 0, ball(radius=8))
    assert with_brains(images, "false", masks) == images
    assert all("mask" in item for item in with_brains(images, True, masks)) and len(made) == 3  # the brain too


def test_without_deepbet_auto_warns_and_true_is_refused(tmp_path, heads, monkeypatch, caplog):
    monkeypatch.setattr(brains, "find_spec", lambda name: None)
    images = [{"image": path} for path in heads]
    assert with_brains(images, "auto", str(tmp_path / "masks")) == images
    assert "dataset_dir: 6 of 6 scans are whole heads and are used as such; deepbet is not installed" in caplog.text
    with pytest.raises(BundleError, match="^brain_extraction: 'true' was given, but deepbet is not installed"):
        with_brains(images, "true", str(tmp_path / "masks"))


def test_a_scan_without_a_brain_is_named(tmp_path, heads, monkeypatch):
    class Nothing:
        def run(self, image):
            return None, nib.Nifti1Image(np.zeros(image.shape, np.uint8), image.affine), None

    class Fails:
        def run(self, image):
            raise AssertionError("no parameters")

    for extractor, why in ((Nothing, "the mask is empty"), (Fails, "no parameters")):
        monkeypatch.setattr(brains, "extractor", extractor)
        with pytest.raises(BundleError) as refused:
            brains.brain_mask(heads[2])
        assert str(refused.value).startswith(f"{heads[2]!r}: no brain was found in it ({why}")
        assert "--exclude \"['sub-02.nii.gz']\"" in str(refused.value)


@pytest.mark.skipif(find_spec("deepbet") is None, reason="deepbet is not installed")
def test_deepbet_gives_one_piece_without_holes_on_the_grid_of_its_scan(tmp_path):
    """An egg of grey and white matter in a skull; real heads are looked at, see docs/heads.md."""
    mm = np.stack(np.meshgrid(*(np.arange(side) * 2.0 - side for side in (90, 108, 90)), indexing="ij"))
    inside = [((mm / np.array(axes)[:, None, None, None]) ** 2).sum(0) for axes in ((68, 84, 62), (76, 94, 72))]
    voxels = (
        20 * (inside[1] < 1)
        + 60 * (inside[0] < 1)
        + 40 * (inside[0] < 0.6)
        + np.random.default_rng(0).normal(0, 2, mm[0].shape)
    )
    path = tmp_path / "head.nii"
    affine = np.array([[-2, 0, 0, 90], [0, 0, 2, -90], [0, -2, 0, 108], [0, 0, 0, 1.0]])
    turned = np.abs(voxels[::-1, :, :].transpose(0, 2, 1)[:, :, ::-1]).astype(np.float32)
    nib.save(nib.Nifti1Image(np.ascontiguousarray(turned.transpose(0, 2, 1)), affine), path)
    mask = brains.brain_mask(str(path))
    found = np.asarray(mask.dataobj)
    assert found.shape == nib.load(path).shape and np.array_equal(mask.affine, affine)
    assert set(np.unique(found)) == {0, 1} and label(found)[1] == 1
    assert label(found == 0)[1] == 1


def brains_command(tmp_path, **knobs):
    places = {"dataset_dir": tmp_path / "raw", "output_dir": tmp_path / "brains", "mask_dir": tmp_path / "masks"}
    return {"config_file": "configs/brains.json"} | places | knobs


def test_a_run_that_is_killed_goes_on_without_doing_anything_twice(tmp_path, heads, stand_in):
    command = bundle_command("run", "brains", **brains_command(tmp_path))
    slow = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"SECONDS_A_SCAN": "1"}, stderr=subprocess.DEVNULL)
    while not stand_in.exists() or len(calls(stand_in)) < 3:
        assert slow.poll() is None
        time.sleep(0.05)
    slow.send_signal(signal.SIGKILL)
    slow.wait()
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    scans = [scan for _, scan in calls(stand_in)]
    assert len(set(scans)) == 6 and len(scans) <= 7  # the one that was being written may be made again
    assert len(list((tmp_path / "masks").glob("*.nii.gz"))) == 6
    assert all(set(np.unique(nib.load(file).get_fdata())) == {0, 1} for file in (tmp_path / "masks").glob("*.nii.gz"))
    for number in range(6):
        brain = np.asarray(nib.load(tmp_path / f"brains/sub-{number:02d}.nii.gz").dataobj)
        assert np.array_equal(brain, np.where(head(number) > 150, head(number), 0)) and brain.dtype == np.int16
    with open(tmp_path / "brains/participants.tsv", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    volume = [float((head(number) > 150).sum() * 8**3 / 1000) for number in range(6)]
    assert [row["participant_id"] for row in rows] == [f"sub-{number:02d}" for number in range(6)]
    assert [float(row["volume_mL"]) for row in rows] == pytest.approx(volume, rel=1e-3)


def test_two_processes_share_the_scans(tmp_path, heads, stand_in):
    knobs = brains_command(tmp_path)
    done = run_two("run", "brains", overlays=["configs/multi_gpu_evaluate.json"], **knobs)
    assert done.returncode == 0, done.stderr
    made = calls(stand_in)
    assert len(made) == len({scan for _, scan in made}) == 6
    assert sorted([pid for pid, _ in made].count(pid) for pid in {pid for pid, _ in made}) == [3, 3]
    assert len(list((tmp_path / "brains").glob("sub-*_mask.nii.gz"))) == 6


def test_the_table_keeps_what_participants_tsv_says(tmp_path, heads, stand_in):
    (tmp_path / "raw/participants.tsv").write_text("participant_id\tage\nsub-00\t31\nsub-03\t62\n")
    done = subprocess.run(bundle_command("run", "brains", **brains_command(tmp_path)), cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "brains/participants.tsv", newline="") as file:
        ages = {row["participant_id"]: row["age"] for row in csv.DictReader(file, delimiter="\t")}
    assert ages["sub-00"] == "31" and ages["sub-03"] == "62" and ages["sub-01"] == "n/a"


def test_brains_are_not_written_among_the_scans(tmp_path, heads):
    done = subprocess.run(
        bundle_command("run", "brains", **brains_command(tmp_path, output_dir=tmp_path / "raw/brains")),
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 1 and "lie in each other; expected two folders" in done.stderr


def test_a_training_from_heads_sees_brains_and_the_evaluation_too(tmp_path, heads, stand_in):
    knobs = {"brain_extraction": "auto", "mask_dir": tmp_path / "masks", "exclude": "['sub-05.nii.gz']"}
    done = train(tmp_path / "raw", tmp_path / "out", val_fraction=0.4, **knobs)
    assert done.returncode == 0, done.stderr
    assert "5 of 5 scans are whole heads; their brains are taken out" in done.stdout
    assert (tmp_path / "out/brains.png").stat().st_mtime < (tmp_path / "out/loss.csv").stat().st_mtime
    with open(tmp_path / "out/brains.csv", newline="") as file:
        assert {row["file"] for row in csv.DictReader(file)} == {f"sub-{i:02d}.nii.gz" for i in range(5)}
    synthetic = tmp_path / "synthetic"  # with air that is as noisy as that of the heads, and never touched
    synthetic.mkdir()
    for number in range(2):
        write(synthetic / f"{number}.nii.gz", head(10 + number).astype(np.float32))
    places = (str(tmp_path / "out/dataset.json"), None, str(synthetic), preprocessing(), str(tmp_path / "cache"))
    of_json = load_cohorts(*places, brain_extraction="auto", mask_dir=str(tmp_path / "other"))
    places = (str(tmp_path / "raw"), None, str(synthetic), preprocessing(), str(tmp_path / "cache"))
    of_folder = load_cohorts(*places, brain_extraction="auto", mask_dir=str(tmp_path / "masks"), exclude=["sub-05*"])
    extracted = [write(tmp_path / f"{i}.nii.gz", np.where(head(i) > 150, head(i), 0)) for i in range(5)]
    expected = np.stack([preprocessing()({"image": path})["image"][0] for path in extracted])
    assert np.array_equal(of_folder.real.volumes, expected)
    assert len(of_json.real) == 3 and len(of_json.held_out) == 2
    of_split = dict(
        zip([*of_json.real.files, *of_json.held_out.files], [*of_json.real.volumes, *of_json.held_out.volumes])
    )
    assert np.array_equal([of_split[path] for path in heads[:5]], expected)
    assert not (tmp_path / "other").exists()

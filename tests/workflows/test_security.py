"""Nothing in a file of weights or a cache is executed, names stay in their folders, and no patient leaks."""

from __future__ import annotations

import ast
import io
import json
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, preprocessing, sample, train
from monai.bundle import ConfigParser
from monai.handlers import CheckpointLoader

from scripts.diffusion.state_dicts import load_file
from scripts.evaluation.evaluator import slug
from scripts.evaluation.pretrained import read_resnet
from scripts.running.checks import check_knobs
from scripts.running.errors import BundleError, root_bundle_error
from scripts.scans.datasets import VolumeDataset
from scripts.scans.find import find_images
from scripts.scans.inspect import readable
from scripts.training.checkpoints import checkpoints_in, newest_whole
from scripts.training.start import begin_with

MARK = "PATIENT_X"


class Malicious:
    """A pickle that makes a file when it is executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


# weights and caches


@pytest.fixture
def trap(tmp_path) -> Path:
    """Exists after the test only if a pickle was executed."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists()


READERS = {
    "model.pt": load_file,
    "checkpoint_00000004.pt": load_file,
    "slice_weights.pt": lambda path: read_resnet(path, "slice_weights"),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "old format"])
def test_a_malicious_pickle_is_refused_and_not_executed(name, legacy, trap, tmp_path):
    content = {"network": Malicious(trap), "ema": {}, "optimizer": {}, "iteration": 4}
    torch.save(content, tmp_path / name, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(BundleError, match=name):
        READERS[name](str(tmp_path / name))


def test_a_malicious_checkpoint_is_passed_over_in_resuming(trap, tmp_path):
    torch.save({"network": 1, "iteration": 2}, tmp_path / "checkpoint_00000002.pt")
    torch.save({"network": Malicious(trap), "iteration": 4}, tmp_path / "checkpoint_00000004.pt")
    content, path = newest_whole(str(tmp_path), ("network", "iteration"))
    assert content["iteration"] == 2 and path == checkpoints_in(str(tmp_path))[1]


def test_the_loader_that_monai_label_inserts_executes_nothing(trap, tmp_path, unet):
    torch.save({"model": Malicious(trap)}, tmp_path / "model.pt")
    loader = CheckpointLoader(str(tmp_path / "model.pt"), {"model": unet})
    with pytest.raises(Exception, match="[Ww]eights.only"):
        loader(type("Engine", (), {"state": None})())


def test_a_malicious_pickle_given_to_a_command_is_refused(trap, tmp_path):
    weights = tmp_path / "weights.pt"
    torch.save({"w": Malicious(trap)}, weights)
    done = sample(weights, tmp_path / "out")
    assert done.returncode == 1
    assert f"error: '{weights}' cannot be read as PyTorch weights" in done.stderr


def test_a_training_does_not_begin_with_a_malicious_pickle(trap, tmp_path, unet):
    torch.save({"w": Malicious(trap)}, tmp_path / "weights.pt")
    with pytest.raises(BundleError, match="weights.pt' cannot be read"):
        begin_with(str(tmp_path / "weights.pt"), unet, unet)


def test_a_poisoned_cache_is_made_anew_and_not_executed(cohort, trap, tmp_path):
    scans = find_images(str(cohort))[:1]
    cache = tmp_path / "cache"
    expected = VolumeDataset(scans, preprocessing(), None, "disk", str(cache))[0]["image"]
    (path,) = cache.rglob("*.pt")
    torch.save({"image": Malicious(trap)}, path)
    assert torch.equal(VolumeDataset(scans, preprocessing(), None, "disk", str(cache))[0]["image"], expected)
    assert torch.equal(torch.load(path, weights_only=True)["image"].float(), expected)


def test_every_torch_load_of_the_bundle_says_weights_only():
    loads = 0
    for path in (ROOT / "scripts").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "pickle.load", "pickle.loads", "os.system"}, f"{path}: {called}"
            if called in {"torch.load", "np.load", "numpy.load"}:
                loads += 1
                assert "weights_only=True" in ast.unparse(node), f"{path}: {ast.unparse(node)}"
    assert loads >= 3


@pytest.mark.parametrize("key", ["prediction_type", "class_names", "voxel_size"])
def test_what_describes_weights_is_not_evaluated_and_is_checked(key, trap, tmp_path):
    """A model.json may come from anybody; to MONAI a text with a dollar sign in a config is Python."""
    (tmp_path / "model.pt").touch()
    hostile = [f"$open({str(trap)!r}, 'w')"] * (1 if key == "class_names" else 3)
    (tmp_path / "model.json").write_text(json.dumps({key: hostile[0] if key == "prediction_type" else hostile}))
    assert f"error: {key}: " in said_before_sampling(tmp_path / "model.pt")


def said_before_sampling(ckpt_path: Path) -> str:
    parser = ConfigParser()
    parser.read_config(ROOT / "configs/inference.json")
    parser["ckpt_path"] = str(ckpt_path)
    with pytest.raises(Exception) as error:
        parser.get_parsed_content("initialize")
    return f"error: {root_bundle_error(error.value)}"


# names


@pytest.mark.parametrize(
    "name", ["..", "../x", "/etc", "a/b", "a\\b", "a\nb", "a\0b", "a\u2028b", "x" * 101, "ä" * 51, "1", "", " a"]
)
def test_a_class_is_no_way_out_of_the_output_folder(name):
    with pytest.raises(BundleError, match="class_names"):
        check_knobs(class_names=[name])


@pytest.mark.parametrize("name", ["glioma", "no tumor", "Gesunde Köpfe", "健康", "x" * 100])
def test_a_class_may_have_spaces_and_any_letters(name):
    check_knobs(class_names=[name])


def test_classes_that_weights_name_are_checked_too(tmp_path):
    (tmp_path / "model.pt").touch()
    (tmp_path / "model.json").write_text(json.dumps({"class_names": ["../../outside"]}))
    assert "error: class_names: ['../../outside'] was given" in said_before_sampling(tmp_path / "model.pt")


@pytest.mark.parametrize("name", ["../../up", "/etc/passwd", "a b\nc", "é" * 300, "..", "x" * 400])
def test_the_name_of_a_cohort_is_part_of_no_path(name):
    assert set(slug(name)) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")


ODD = [
    "with space.nii.gz",
    "..dots..nii.gz",
    "Ünï©ødé.nii.gz",
    "new\nline.nii.gz",
    "'quote\".nii.gz",
    "x" * 240 + ".nii.gz",
]


def test_scans_with_odd_names_write_nothing_outside(cohort, tmp_path):
    """They are read under their names, and nothing is ever written under them."""
    source = find_images(str(cohort))[0]["image"]
    folder = tmp_path / "scans" / "sub..dir"
    folder.mkdir(parents=True)
    (tmp_path / "elsewhere.nii.gz").write_bytes(Path(source).read_bytes())
    for name in ODD:
        (folder / name).write_bytes(Path(source).read_bytes())
    (folder / "link.nii.gz").symlink_to(tmp_path / "elsewhere.nii.gz")
    (folder / "bytes.nii.gz").write_bytes(Path(source).read_bytes())
    found = find_images(str(tmp_path / "scans"))
    hidden = sum(name.startswith(".") for name in ODD)
    assert len(found) == len(ODD) + 2 - hidden
    out = tmp_path / "out"
    assert readable(found, checked_path=str(out / "checked.json")) == found
    dataset = VolumeDataset(found, preprocessing(), None, "disk", str(out / "cache"))
    for i in range(len(dataset)):
        assert dataset[i]["image"].shape == (1, 16, 16, 16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["elsewhere.nii.gz", "out", "scans"]
    written = [p.name for p in out.rglob("*") if p.is_file()]
    assert len(written) == len(found) + 1 and all(name == "checked.json" or len(name) == 67 for name in written)


# patients


def marked_bytes(path: Path) -> bytes:
    """Everything in a file, unpacked where it is packed."""
    content = path.read_bytes()
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return b"".join(name.encode() + archive.read(name) for name in archive.namelist())
    return nib.openers.ImageOpener(str(path)).read() if path.name.endswith(".gz") else content


def test_nothing_about_patients_is_in_weights_samples_or_logs(cohort, tmp_path):
    scans, out = tmp_path / "scans", tmp_path / "out"
    for i, item in enumerate(find_images(str(cohort))):
        image = nib.load(item["image"])
        for field in ("descrip", "db_name", "aux_file", "intent_name"):
            image.header[field] = MARK.encode()
        image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", MARK.encode()))
        path = scans / f"{MARK}_{i}" / f"sub-{i}{MARK}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        nib.save(image, path)
        assert MARK.encode() in nib.openers.ImageOpener(str(path)).read(1000)
    done = train(scans, out, cache="disk")
    assert done.returncode == 0, done.stderr
    drawn = sample(out / "models/model.pt", tmp_path / "samples", num_samples=1, num_inference_steps=2)
    assert drawn.returncode == 0, drawn.stderr
    for words in (done.stdout, done.stderr, drawn.stdout, drawn.stderr):
        assert MARK not in words
    written = [p for folder in (out, tmp_path / "samples") for p in folder.rglob("*") if p.is_file()]
    assert {"model.pt", "model.json", "checkpoint_00000006.pt", "loss.csv", "sample_seed0_volume000.nii.gz"} <= {
        p.name for p in written
    }
    with_mark = {p.name for p in written if MARK.encode() in marked_bytes(p) or MARK in str(p.relative_to(tmp_path))}
    assert with_mark == {"dataset.json", "brains.csv"}  # which are there to say what was trained on
    header = nib.load(tmp_path / "samples/sample_seed0_volume000.nii.gz").header
    assert bytes(header["descrip"]).startswith(b"synthetic") and not header.extensions
    assert np.array_equal(header["db_name"], b"") and np.array_equal(header["aux_file"], b"")

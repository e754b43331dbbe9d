"""Sampling runs that find volumes: what is kept, moved, refused, made again, and what is left in the files."""

import ast
import gzip
import json
import sys

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_NETWORK, small_unet
from monai.bundle import create_workflow
from monai.networks.nets import DiffusionModelUNet
from PIL import Image

from scripts.diffusion.sampler import DiffusionSampler
from scripts.running.errors import root_bundle_error
from scripts.scans.find import find_images

TINY = {key: ast.literal_eval(value) for key, value in TINY_NETWORK.items()} | {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Two networks, in a folder that is named as no output may be."""
    folder = tmp_path_factory.mktemp("hospital_doe_jane")
    for name, factor in {"model.pt": 1.0, "other.pt": 0.9}.items():
        torch.save({key: factor * t for key, t in small_unet().state_dict().items()}, folder / name)
    return folder


@pytest.fixture
def sample(weights, tmp_path, monkeypatch):
    """Sample into a folder in this process; the error where it is refused."""

    def run(**knobs):
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        places = {"bundle_root": str(ROOT), "output_dir": str(tmp_path / "out"), "ckpt_path": str(weights / "model.pt")}
        knobs = TINY | places | {"device": "cpu", "logging_file": False, "num_samples": 2} | knobs
        config = str(ROOT / "configs/inference.json")
        try:
            create_workflow(config_file=config, workflow_type="inference", **knobs).run()
        except Exception as e:
            if root_bundle_error(e) is None:
                raise
            return str(root_bundle_error(e))

    return run


def stamps(folder):
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.glob("sample_*"))}


def voxels(path):
    return np.asarray(nib.load(path).dataobj)


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("L")).astype(int)


def test_a_resumed_run_makes_what_is_missing_and_its_mosaic_shows_all(sample, tmp_path):
    assert sample() is None
    before = stamps(tmp_path / "out")
    assert sample(num_samples=5, batch_size=2, resume=True) is None
    after = stamps(tmp_path / "out")
    assert len(before) == 2 and len(after) == 5 and before.items() <= after.items()
    assert sample(num_samples=5, output_dir=str(tmp_path / "at_once")) is None
    for name in after:
        np.testing.assert_array_equal(voxels(tmp_path / "out" / name), voxels(tmp_path / "at_once" / name))
    mosaics = [picture(tmp_path / folder / "mosaic.png") for folder in ("out", "at_once")]
    np.testing.assert_array_equal(*mosaics)
    (tmp_path / "out/mosaic.png").unlink()
    assert sample(num_samples=5, resume=True) is None  # nothing is missing but the picture
    assert stamps(tmp_path / "out") == after
    np.testing.assert_array_equal(picture(tmp_path / "out/mosaic.png"), mosaics[0])


def test_a_run_does_not_go_on_with_other_settings_weights_or_seeds(sample, weights, tmp_path):
    assert sample() is None
    before = stamps(tmp_path / "out")
    said = sample(resume=True, solver="ddpm")
    assert said.startswith("resume: 2 of 2 volumes are there") and "solver was 'dpmpp_2m_sde' and is 'ddpm'" in said
    said = sample(resume=True, ckpt_path=str(weights / "other.pt"))
    assert "other weights (for example" in said and "was" not in said.split("otherwise: ")[1].split("(")[0]
    assert "seed -1" in sample(resume=True, seed=-1)
    assert "resume: 'maybe' was given" in sample(resume="maybe")
    assert stamps(tmp_path / "out") == before
    assert sample(resume=True, seed=3) is None and len(stamps(tmp_path / "out")) == 4  # other volumes


def test_a_new_run_sets_volumes_of_other_settings_aside_and_warns_of_those_beside(sample, tmp_path, caplog):
    out = tmp_path / "out"
    assert sample(num_samples=3) is None
    before = {name: voxels(out / name) for name in stamps(out)}
    assert sample(solver="ddim") is None
    moved = sorted((out / ".previous_1").iterdir())
    assert [path.name for path in moved] == list(before)[:2]
    for path in moved:
        np.testing.assert_array_equal(voxels(path), before[path.name])
        assert np.abs(voxels(out / path.name) - before[path.name]).max() > 1
    assert len(find_images(str(out))) == 3
    (text,) = [text for text in caplog.messages if "other volumes" in text]
    assert text.startswith("1 other volumes") and "solver was 'dpmpp_2m_sde' and is 'ddim'" in text
    settings = json.loads((out / "samples.json").read_text())
    assert sorted(entry["solver"] for entry in settings.values()) == ["ddim", "dpmpp_2m_sde"]
    caplog.clear()
    times = stamps(out)
    assert sample(solver="ddim") is None  # the same again: nothing to be set aside
    assert [path.name for path in out.glob(".previous_*")] == [".previous_1"]
    assert times != stamps(out) and "volume000" not in " ".join(caplog.messages).split("other volumes")[0]


def test_volumes_that_nothing_is_known_of_are_not_replaced(sample, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    stranger = nib.Nifti1Image(np.ones((4, 4, 4), np.float32), np.eye(4))
    nib.save(stranger, out / "sample_seed0_volume001.nii.gz")
    assert "samples.json does not say how" in sample(resume=True)
    assert sample() is None
    assert voxels(out / ".previous_1/sample_seed0_volume001.nii.gz").shape == (4, 4, 4)


@pytest.mark.parametrize("damage", ["half", "bit", "empty"])
def test_a_damaged_volume_is_made_again(sample, tmp_path, caplog, damage):
    assert sample() is None
    path = tmp_path / "out/sample_seed0_volume001.nii.gz"
    whole, wanted = path.read_bytes(), voxels(path)
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 16]) + whole[middle + 1 :]
    path.write_bytes({"half": whole[:middle], "bit": flipped, "empty": b""}[damage])
    before = stamps(tmp_path / "out")
    assert sample(resume=True) is None
    after = stamps(tmp_path / "out")
    assert [name for name in after if after[name] != before[name]] == [path.name]
    np.testing.assert_array_equal(voxels(path), wanted)
    assert path.read_bytes() == whole


def test_images_and_classes_resume_too(sample, tmp_path, weights):
    size = {"spatial_shape": [16, 16], "voxel_size": [1.0, 1.0], "class_names": ["bright", "dark"]}
    knobs = size | {"class_label": ["bright", "dark", None], "ckpt_path": str(tmp_path / "flat.pt"), "num_samples": 4}
    unet = DiffusionModelUNet(2, 1, 1, 1, (8, 8), (False, True), 8, num_head_channels=(0, 8), num_class_embeds=3)
    torch.save(unet.state_dict(), tmp_path / "flat.pt")
    assert sample(**knobs) is None
    files = {path: path.read_bytes() for path in (tmp_path / "out").rglob("sample_*.png")}
    mosaic = picture(tmp_path / "out/mosaic.png")
    assert {path.parent.name for path in files} == {"bright", "dark", "out"} and len(files) == 4
    removed = tmp_path / "out/dark/sample_seed0_volume001.png"
    removed.unlink()
    (removed.parent / "sample_seed0_volume009.png.partial").write_bytes(b"half")
    before = {path: path.stat().st_mtime_ns for path in files if path != removed}
    assert sample(**knobs, resume=True) is None
    assert {path: path.read_bytes() for path in files} == files  # the same bytes
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not list(tmp_path.rglob("*.partial"))
    assert np.abs(picture(tmp_path / "out/mosaic.png") - mosaic).max() <= 2  # a PNG has whole grey values


def test_without_the_handler_that_writes_nothing_is_written(sample, tmp_path):
    assert sample(handlers=[]) is None
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".lock"]


def test_no_file_names_the_machine_or_the_weights_folder(sample, weights, tmp_path):
    assert sample() is None
    files = [path for path in (tmp_path / "out").iterdir() if path.name != ".lock"]
    assert len(files) == 4
    for path in files:
        content = path.read_bytes()
        if path.suffix == ".gz":
            assert content[3] == 0 and content[4:8] == bytes(4)  # no name and no time in gzip's own header
            content = gzip.decompress(content)
            header = nib.Nifti1Image.from_bytes(content).header
            assert header["descrip"].item().decode().startswith("synthetic, brain_mri_ddpm_3d, seed 0, volume ")
            assert not header.extensions and header["aux_file"].item() == header["db_name"].item() == b""
        for secret in ("doe", "jane", "hospital", str(tmp_path), str(ROOT)):
            assert secret.encode() not in content.lower(), (path.name, secret)


def test_weights_that_are_not_finite_make_nothing(sample, weights, tmp_path):
    broken = torch.load(weights / "model.pt", weights_only=True)
    broken["out.2.conv.bias"] = torch.full((1,), float("nan"))
    torch.save(broken, weights / "broken.pt")
    said = sample(ckpt_path=str(weights / "broken.pt"))
    assert said is not None and "holds NaN or infinite weights in 1 of" in said and "out.2.conv.bias" in said
    assert not (tmp_path / "out").exists()


def test_a_volume_that_is_not_finite_is_not_written(sample, tmp_path, monkeypatch):
    make = DiffusionSampler.forward

    def spoil(self, noise, *args, **kwargs):
        volumes = make(self, noise, *args, **kwargs)
        volumes[-1, 0, 3, 3, 3] = float("nan")
        return volumes

    assert sample(num_samples=1) is None
    before = stamps(tmp_path / "out")
    (tmp_path / "out/mosaic.png").unlink()
    monkeypatch.setattr(DiffusionSampler, "forward", spoil)
    said = sample(num_samples=2, resume=True)
    assert "sample_seed0_volume001.nii.gz' was not written: 1 of its 4096 voxels are NaN or infinite" in said
    assert stamps(tmp_path / "out") == before and not (tmp_path / "out/mosaic.png").exists()

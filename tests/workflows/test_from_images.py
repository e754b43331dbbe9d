"""Networks that are shown images: trained, sampled from a folder of images, and grown, by the real commands."""

import json
import re
import shutil
import sys
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, TINY_NETWORK, run_bundle, train, workflow
from monai.data import MetaTensor
from PIL import Image

from scripts.diffusion.loaded import loaded
from scripts.sampling.shown import on_grid
from scripts.scans.phantoms import phantom_cohort

SHOWN = {"wavelet_levels": "1", "channels": "[8,8]", "image_pattern": "phantom_???.nii.gz"}


def preset(config, *names):
    return str([f"configs/{config}.json", *(f"configs/presets/{name}.json" for name in names)])


def from_images(run, condition_dir, output, *presets, **more):
    knobs = {"config_file": preset("inference", *presets), "ckpt_dir": run / "models", "output_dir": output}
    knobs |= {"condition_dir": condition_dir, "num_samples": 2, "num_inference_steps": 2, "wavelet_levels": "1"}
    return run_bundle("run", "from_images", **TINY_NETWORK | knobs | more)


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Six phantoms of 24^3 voxels of 8 mm with label maps and a second contrast."""
    return phantom_cohort(str(tmp_path_factory.mktemp("heads")), 6, (24, 24, 24), 8.0, seed=1, images=True)


@pytest.fixture(scope="module")
def from_labels(heads, tmp_path_factory):
    output = tmp_path_factory.mktemp("from_labels")
    done = train(heads, output, config_file=preset("train", "label_to_image"), **SHOWN)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture
def in_float32(monkeypatch):
    """Networks in this process compute in float32 on every CPU: bfloat16 rounds otherwise in another process."""
    monkeypatch.setattr("scripts.diffusion.acceleration.fast_in_bfloat16", lambda: False)


def asked(heads, folder, *ends):
    """A folder with the images of two heads."""
    folder.mkdir()
    for i in (0, 1):
        for end in ends:
            shutil.copy(f"{heads}/phantom_00{i}{end}.nii.gz", folder)
    return folder


def test_label_maps_are_written_down_and_shown_in_previews(from_labels):
    known = json.loads((from_labels / "models/model.json").read_text())["condition_images"]
    assert known == [{"name": "labels", "suffix": "_dseg", "labels": [1, 2, 3]}]
    assert (from_labels / "previews/preview_00000006.png").exists()
    assert (from_labels / "validation.csv").read_text().count("ema") == 2


def test_pairs_of_volumes_and_labels_come_on_the_grid_of_the_label_map(heads, from_labels, tmp_path):
    folder = asked(heads, tmp_path / "asked", "_dseg")
    moved = nib.load(folder / "phantom_001_dseg.nii.gz")  # seen from the other side, at another place
    affine = moved.affine @ np.diag([-1, 1, 1, 1]) + np.array([[0] * 3 + [30]] * 3 + [[0] * 4])
    nib.save(nib.Nifti1Image(np.asarray(moved.dataobj)[::-1, :, :20], affine), folder / "phantom_001_dseg.nii.gz")
    done = from_images(from_labels, folder, tmp_path / "out", "label_to_image", guidance_scale=2)
    assert done.returncode == 0, done.stderr
    for i in (0, 1):
        labels = nib.load(folder / f"phantom_00{i}_dseg.nii.gz")
        voxels = []
        for volume in (0, 1):
            base = tmp_path / f"out/phantom_00{i}_seed0_volume00{volume}"
            pair = nib.load(f"{base}_dseg.nii.gz")
            assert np.array_equal(pair.dataobj, labels.dataobj) and np.array_equal(pair.affine, labels.affine)
            image = nib.load(f"{base}.nii.gz")
            assert image.shape == labels.shape
            np.testing.assert_allclose(image.affine, labels.affine, atol=1e-4)
            voxels.append(image.get_fdata())
            assert 0 <= voxels[-1].min() and 50 < voxels[-1].max() <= 255
        assert not np.array_equal(*voxels)
    assert Image.open(tmp_path / "out/from_images.png").size[0] > 100


def test_the_operator_of_deploys_page_makes_the_same_volume(in_float32, heads, from_labels, tmp_path, monkeypatch):
    """With as much of Deploy as it touches; the application itself runs in an environment of its own."""

    class Sent:
        def __init__(self, voxels, metadata):
            self.voxels, self.about = voxels, metadata

        def asnumpy(self):
            return self.voxels

        def metadata(self):
            return self.about

    nothing = type("Nothing", (), {"__init__": lambda *_, **__: None})
    core = SimpleNamespace(Application=nothing, Image=Sent, Operator=nothing)
    modules = {"monai.deploy.core": core, "monai.deploy.conditions": SimpleNamespace(CountCondition=None)}
    modules["app"] = SimpleNamespace(SEED=7, WriterOperator=None)
    for name, module in ({"monai.deploy": SimpleNamespace()} | modules).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setenv("BUNDLE", str(ROOT))
    page = (ROOT / "docs/monai_deploy.md").read_text()
    names = {"__name__": "from_image"}
    exec(re.search(r"`from_image.py`:\n\n```python\n(.*?)```", page, re.S)[1], names)
    folder, sent = asked(heads, tmp_path / "asked", "_dseg"), []
    reader = names["ReadOperator"](None, files=[folder / "phantom_000_dseg.nii.gz"])
    reader.compute(None, SimpleNamespace(emit=lambda image, _: sent.append(image)), None)
    painter = names["FromImageOperator"](None, ckpt_path=str(from_labels / "models/model.pt"))
    through = SimpleNamespace(receive=lambda _: sent[0]), SimpleNamespace(emit=lambda image, _: sent.append(image))
    painter.compute(*through, None)
    knobs = {"num_samples": 1, "seed": 7, "amp": "float32", "num_inference_steps": 10}  # as many as the process has
    done = from_images(from_labels, folder, tmp_path / "out", "label_to_image", **knobs)
    assert done.returncode == 0, done.stderr
    made = nib.load(tmp_path / "out/phantom_000_seed7_volume000.nii.gz")
    np.testing.assert_allclose(sent[1].asnumpy().T, made.get_fdata(), atol=1.01)  # Deploy cuts off the decimals
    np.testing.assert_allclose(sent[1].metadata()["affine"], made.affine, atol=1e-4)


def test_monai_label_shows_the_image_that_a_client_names(in_float32, heads, from_labels, tmp_path):
    """In the wiring of the overlay: what Label runs is preprocessing, inferer, postprocessing."""
    folder = asked(heads, tmp_path / "asked", "_dseg")
    configs = [str(ROOT / f"configs/{name}.json") for name in ("inference", "label_images")]
    weights = str(from_labels / "models/model.pt")
    knobs = {"bundle_root": str(ROOT), "displayable_configs#seed": 7, "num_inference_steps": 2}
    parser = loaded(configs, weights, knobs=knobs)
    item = parser.get_parsed_content("preprocessing")({"image": str(folder / "phantom_000_dseg.nii.gz")})
    assert item["image"].shape == (4, 16, 16, 16)  # noise, and three labels
    pred = parser.get_parsed_content("inferer")(item["image"][None], parser.get_parsed_content("network_def"))
    pred = parser.get_parsed_content("postprocessing")({"pred": pred[0]})["pred"]
    knobs = {"num_samples": 1, "seed": 7, "amp": "float32"}
    done = from_images(from_labels, folder, tmp_path / "out", "label_to_image", **knobs)
    assert done.returncode == 0, done.stderr
    made = nib.load(tmp_path / "out/phantom_000_seed7_volume000.nii.gz")
    cube = MetaTensor(pred, affine=item["image"].affine)
    np.testing.assert_allclose(on_grid(cube, made.affine, made.shape), made.get_fdata(), atol=0.1)


def test_without_images_the_volumes_are_those_of_a_network_that_is_shown_nothing(from_labels, tmp_path):
    knobs = {"ckpt_path": str(from_labels / "models/model.pt"), "num_samples": 1, "num_inference_steps": 2}
    workflow("inference", tmp_path, wavelet_levels=1, **knobs).run()
    assert nib.load(tmp_path / "sample_seed0_volume000.nii.gz").shape == (16, 16, 16)


def test_thick_slices_become_as_thin_as_the_networks_voxels(heads, tmp_path):
    """The shipped wiring of a condition that is made of the scan itself."""
    names = ("super_resolution",)
    done = train(heads, tmp_path, config_file=preset("train", *names), low_resolution="[1,1,2]", **SHOWN)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "models/model.json").read_text())["condition_images"][0]["name"] == "low_resolution"
    size = json.loads((tmp_path / "models/model.json").read_text())["voxel_size"][0]
    (tmp_path / "asked").mkdir()
    thin = nib.load(f"{heads}/phantom_000.nii.gz")
    thick = np.asarray(thin.dataobj).reshape(24, 24, 8, 3).mean(-1).astype(np.int16)
    affine = thin.affine @ np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 3, 1], [0, 0, 0, 1.0]])
    nib.save(nib.Nifti1Image(thick, affine), tmp_path / "asked/scan.nii.gz")
    done = from_images(tmp_path, tmp_path / "asked", tmp_path / "out", *names, num_samples=1)
    assert done.returncode == 0, done.stderr
    image = nib.load(tmp_path / "out/scan_seed0_volume000.nii.gz")
    parts = round(24 / size)
    assert parts > 1 and image.shape == (24, 24, 8 * parts)
    corner = [-0.5, -0.5, -0.5, 1]
    np.testing.assert_allclose(image.affine @ corner, affine @ corner, atol=1e-4)
    other = [23.5, 23.5, 8 * parts - 0.5, 1], [23.5, 23.5, 7.5, 1]
    np.testing.assert_allclose(image.affine @ other[0], affine @ other[1], atol=1e-4)


def test_a_network_of_holes_fills_them_and_leaves_the_rest(heads, tmp_path):
    done = train(heads, tmp_path, config_file=preset("train", "inpainting"), **SHOWN)
    assert done.returncode == 0, done.stderr
    scan = nib.load(f"{heads}/phantom_000.nii.gz")
    hole = np.zeros(scan.shape, np.uint8)
    hole[8:14, 8:14, 10:14] = 1
    nib.save(nib.Nifti1Image(hole, scan.affine), tmp_path / "hole.nii.gz")
    knobs = {"config_file": preset("inference", "inpainting"), "ckpt_dir": tmp_path / "models", "wavelet_levels": "1"}
    knobs |= {"known": f"{heads}/phantom_000.nii.gz", "known_mask": tmp_path / "hole.nii.gz", "num_samples": 1}
    done = run_bundle("run", "fill", **TINY_NETWORK | knobs | {"output_dir": tmp_path, "num_inference_steps": 2})
    assert done.returncode == 0, done.stderr
    result = np.asarray(nib.load(tmp_path / "phantom_000_filled_seed0_volume000.nii.gz").dataobj)
    assert np.array_equal(result[hole == 0], np.asarray(scan.dataobj)[hole == 0])
    assert (result[hole == 1] != np.asarray(scan.dataobj)[hole == 1]).any()


def test_weights_that_were_shown_nothing_grow_and_the_run_goes_on(heads, from_labels, tmp_path):
    knobs = SHOWN | {"config_file": preset("train", "translation"), "init_ckpt": from_labels / "models/model.pt"}
    done = train(heads, tmp_path, max_iterations=2, **knobs)
    assert done.returncode == 0, done.stderr
    assert "grown from the condition images" in done.stdout + done.stderr
    done = train(heads, tmp_path, max_iterations=4, resume="true", **knobs)
    assert done.returncode == 0 and "resumed after iteration 2" in done.stdout, done.stderr
    done = train(heads, tmp_path, max_iterations=5, resume="true", **knobs | {"config_file": "configs/train.json"})
    assert done.returncode == 1 and "the run that goes on was begun with ['t2']" in done.stderr


def test_a_folder_that_cannot_be_used_gets_its_sentence(heads, from_labels, trained, tmp_path):
    contrast, empty = asked(heads, tmp_path / "contrast", "_T2w"), tmp_path / "empty"
    empty.mkdir()
    strange = asked(heads, tmp_path / "strange", "_dseg")
    labels = nib.load(strange / "phantom_000_dseg.nii.gz")
    nib.save(nib.Nifti1Image(np.asarray(labels.dataobj) + 4, labels.affine), strange / "phantom_000_dseg.nii.gz")
    for folder, words in {
        contrast: ["holds none; expected labels (*_dseg.nii.gz)"],
        empty: ["holds none"],
        strange: ["phantom_000_dseg.nii.gz' has the labels [4, 5, 6, 7], but 'labels' of these weights has [1, 2, 3]"],
    }.items():
        done = from_images(from_labels, folder, tmp_path / "out")
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert all(word in done.stderr for word in words), done.stderr
    done = run_bundle(
        "run", "from_images", **TINY_NETWORK, config_file="configs/inference.json", ckpt_dir=trained / "models",
        condition_dir=contrast, output_dir=tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 1 and "were not trained with condition_images" in done.stderr
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").glob("*.nii.gz"))

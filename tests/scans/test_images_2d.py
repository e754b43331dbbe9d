"""2D images: read alike from pictures and NIfTI slices, trained on, sampled as PNG, and evaluated class by class."""

import csv
import json
from dataclasses import replace
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, run_bundle
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from PIL import Image

from scripts.evaluation.by_class import ByClass
from scripts.evaluation.cohorts import HELD_OUT, Cohort, Cohorts
from scripts.evaluation.diversity import Diversity
from scripts.running.checks import check_network
from scripts.running.errors import BundleError
from scripts.sampling.mosaic import save_denoising
from scripts.sampling.volumes import SaveVolumes
from scripts.scans.find import find_images
from scripts.scans.inspect import examine, readable
from scripts.scans.split import split_by_subject

TRAIN, INFERENCE, EVALUATE = (
    f"['configs/{name}.json','configs/presets/mridiff.json']" for name in ("train", "inference", "evaluate")
)
TINY = {"spatial_shape": "[16,16]", "channels": "[8,8,8]", "num_head_channels": "[0,8,8]", "num_train_timesteps": "10"}
PAGE = np.zeros((60, 40), np.uint8)  # rows, columns: bright in the upper left corner, dim in the lower right one
PAGE[5:20, 5:15], PAGE[50:55, 30:35] = 200, 100


def preprocessing(**knobs):
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs/train.json"), str(ROOT / "configs/presets/mridiff.json")])
    parser.update(knobs)
    return parser.get_parsed_content("train#preprocessing")


def as_slice(page, scale=1.0):
    """A page as an axial NIfTI slice shows it: first axis to the right, second upwards."""
    return (np.rot90(page, -1) * scale).copy()


def written(kind, folder):
    """PAGE in a file of that kind; returns its path and the grey value that its 200 should become in [-1, 1]."""
    path = folder / f"image_{kind}"
    if kind.endswith(("png", "JPG")):
        picture = Image.fromarray(PAGE)
        mode = {"rgb.JPG": "RGB", "rgba.png": "RGBA", "palette.png": "P"}.get(kind)
        picture = Image.fromarray(PAGE.astype(np.uint16) * 100) if kind == "16bit.png" else picture
        (picture.convert(mode) if mode else picture).save(path)
    else:
        voxels = as_slice(PAGE, 7.0).astype(np.float32) - 300
        affine = np.diag([2.0, 2, 2, 1])
        if kind == "las.nii":
            voxels, affine[0, 0] = voxels[::-1].copy(), -2
        nib.save(nib.Nifti1Image(voxels if kind == "flat.nii.gz" else voxels[..., None], affine), path)
    return str(path), 200 / 255 * 2 - 1 if kind in ("grey.png", "rgb.JPG", "rgba.png", "palette.png") else 1.0


@pytest.mark.parametrize(
    "kind", ["grey.png", "rgb.JPG", "rgba.png", "palette.png", "16bit.png", "flat.nii.gz", "one_thick.nii", "las.nii"]
)
def test_pictures_and_slices_become_the_same_image(kind, tmp_path):
    path, bright = written(kind, tmp_path)
    assert [item["image"] for item in find_images(str(tmp_path), None, 2)] == [path] and examine(path, 2).problem == ""
    item = preprocessing(spatial_shape=[60, 60])({"image": path})  # the longer side as it is: letterboxed, not resized
    image = item["image"].float().numpy()
    assert image.shape == (1, 60, 60) and item["voxel_size"].tolist() == ([2, 2] if "nii" in kind else [1, 1])
    expected = np.full((60, 60), -1.0)
    expected[:, 10:50] = np.where(PAGE == 200, bright, np.where(PAGE == 100, 0.5 * bright - 0.5, -1.0))
    tolerance = 0.25 if "JPG" in kind else 2e-3
    np.testing.assert_allclose(np.rot90(image[0]), expected, atol=tolerance)


def test_a_smaller_image_is_smoothed_and_keeps_its_mean_and_its_range(tmp_path):
    rng = np.random.default_rng(0)
    noise = np.zeros((128, 128), np.uint8)
    noise[8:-8, 8:-8] = rng.integers(0, 2, (112, 112)) * 255  # a naive pick of pixels would keep this checkered
    Image.fromarray(noise).save(tmp_path / "a.png")
    image = preprocessing()({"image": str(tmp_path / "a.png")})["image"].float()
    assert image.shape == (1, 44, 44) and image.min() >= -1 and image.max() <= 1
    assert (image[0].mean() + 1) / 2 == pytest.approx(noise.mean() / 255, abs=0.01)
    assert image[0, 8:-8, 8:-8].std() < 0.5  # it is 1 before


def test_pictures_are_found_in_2d_alone_and_each_is_its_own_subject(tmp_path):
    for name in (
        "glioma/a.png",
        "glioma/b.JPEG",
        "no_tumor/a.jpg",
        ".hidden/c.png",
        "no_tumor/notes.txt",
        "mosaic.png",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert find_images(str(tmp_path)) == []
    images = find_images(str(tmp_path), None, 2)
    assert [item["image"][len(str(tmp_path)) + 1 :] for item in images] == [
        "glioma/a.png",
        "glioma/b.JPEG",
        "no_tumor/a.jpg",
    ]
    training, held_out = split_by_subject(images, 0.4, 0)
    assert len(training) == 2 and len(held_out) == 1
    with pytest.raises(BundleError, match="mask_suffix: '_mask' .* 2D"):
        find_images(str(tmp_path), "_mask", 2)


def test_bad_pictures_are_named_with_what_is_wrong(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 50), np.uint8)).save(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:1000])
    (tmp_path / "text.jpg").write_bytes(b"no picture")
    Image.fromarray(np.full((50, 50), 7, np.uint8)).save(tmp_path / "even.png")
    Image.fromarray(PAGE[:7]).save(tmp_path / "thin.png")
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random((20, 20, 20)), np.eye(4)), tmp_path / "volume.nii")
    with pytest.raises(BundleError) as error:
        readable(find_images(str(tmp_path), None, 2), spatial_dims=2)
    first, *lines = str(error.value).splitlines()
    assert "5 files of 6" in first
    sentences = {
        "cut.png": "cannot be read as a picture",
        "even.png": "the same value, 7, in every pixel",
        "text.jpg": "cannot be read as a picture",
        "thin.png": r"has shape (40, 7); expected at least 8 pixels",
        "volume.nii": "a slice with two dimensions",
    }
    for line, (name, sentence) in zip(lines, sentences.items(), strict=True):
        assert name in line and sentence in line


def test_a_sampled_image_is_an_upright_png_that_reads_back_as_it_was(tmp_path):
    pred = torch.from_numpy(as_slice(PAGE[:40], 1.0).astype(np.float32))[None]
    noise = MetaTensor(torch.zeros_like(pred), meta={"seed": 3, "volume": 5})
    state = SimpleNamespace(
        batch=[{"image": noise, "folder": "", "suffix": "", "said": ""}], output=[{"pred": pred + 0.3}]
    )
    SaveVolumes(str(tmp_path))(SimpleNamespace(state=state))
    path = tmp_path / "sample_seed3_volume005.png"
    with Image.open(path) as picture:
        assert picture.mode == "L" and "seed 3, volume 5" in picture.text["Description"]
        assert np.array_equal(np.asarray(picture), PAGE[:40])
    again = preprocessing(spatial_shape=[40, 40])({"image": str(path)})["image"].float()
    torch.testing.assert_close(again, pred / 127.5 - 1, atol=1e-3, rtol=0)


def test_the_way_from_noise_to_an_image_is_one_row(tmp_path):
    sampler = SimpleNamespace(on_the_way=lambda noise: (noise * i for i in range(10)))
    save_denoising(sampler, torch.randn(1, 1, 24, 8), str(tmp_path / "way.png"), num_frames=4)
    with Image.open(tmp_path / "way.png") as picture:
        assert picture.size == (4 * 24 * 12, 8 * 12)


@pytest.mark.parametrize("presets, side, batch", [(["mridiff"], 44, 80), (["mridiff", "mridiff_72"], 72, 40)])
def test_the_presets_are_mridiffs_settings(presets, side, batch):
    parser = ConfigParser()
    parser.read_config([str(ROOT / f"configs/{name}.json") for name in ["train", *(f"presets/{p}" for p in presets)]])
    check_network(*(parser[key] for key in ("spatial_shape", "channels", "attention_levels", "num_head_channels")), 8)
    assert parser["spatial_shape"] == [side, side] and parser["batch_size"] == batch
    assert (parser["num_train_timesteps"], parser["learning_rate"]) == (300, 1e-3)
    parser["huber_delta"] = 0.5
    loss = parser.get_parsed_content("loss")
    errors = torch.tensor([0.2, 3.0])
    assert loss(errors, torch.zeros(2)).item() == pytest.approx((0.5 * 0.2**2 + 0.5 * (3 - 0.25)) / 2)
    network = parser.get_parsed_content("network_def")
    assert network(torch.randn(1, 1, side, side), torch.tensor([5.0])).shape == (1, 1, side, side)


def test_a_side_that_four_levels_do_not_divide_is_refused_with_what_would_do():
    with pytest.raises(BundleError, match="44 is not divisible by 8.*4 levels.*40 or 48, or fewer levels"):
        check_network([44, 44], [32, 32, 64, 64], [False] * 4, [0, 0, 0, 64], 8)


# class by class


def images_of(name, counts, seed, folder="/d"):
    """A cohort of smooth random images, class after class."""
    rng = np.random.default_rng(seed)
    files = [f"{folder}/{name}/{of}/{i}.png" for of, count in counts.items() for i in range(count)]
    coarse = rng.uniform(-1, 1, (len(files), 4, 4))
    volumes = coarse.repeat(5, 1).repeat(5, 2).astype(np.float16)
    return Cohort(name, files, volumes, np.ones((len(files), 2), np.float32), folder=f"{folder}/{name}")


def test_a_row_of_a_class_is_the_measure_of_its_images_alone(tmp_path):
    real, ours = (images_of(name, {"round": 5, "square": 4}, seed) for seed, name in enumerate(("real", "ours")))
    flat = images_of("flat", {"": 6}, 3)
    few = images_of("few", {"square": 3, "round": 1}, 4)
    cohorts = Cohorts(real, None, [ours, flat, few])
    diversity = Diversity(["kwon2019"], num_pairs=20, device="cpu")
    measure = ByClass(["round", "square"], [diversity])
    measure.check(cohorts)
    results = {cohort.name: measure(cohort, cohorts) for cohort in cohorts}
    rows = {name: {row["metric"]: row["value"] for row in result["rows"]} for name, result in results.items()}
    assert list(rows["ours"]) == ["ms_ssim_kwon2019_round", "ms_ssim_kwon2019_square"]
    for name, volumes in (("round", ours.volumes[:5]), ("square", ours.volumes[5:])):
        alone = Cohort("alone", ["a"] * len(volumes), volumes, np.ones((len(volumes), 2)))
        (row,) = diversity(alone, Cohorts(alone, None, []))["rows"]
        assert rows["ours"][f"ms_ssim_kwon2019_{name}"] == pytest.approx(row["value"])
    assert len(set(rows["flat"].values())) == 1 and "no folders of classes" in results["flat"]["notes"][0]
    assert list(rows["few"]) == ["ms_ssim_kwon2019_square"] and "fewer than two" in results["few"]["notes"][0]
    figures = measure.draw(results, cohorts, str(tmp_path))
    assert [figure["title"] for figure in figures] == ["round: Pair-wise MS-SSIM", "square: Pair-wise MS-SSIM"]
    assert len({figure["file"] for figure in figures}) == 2
    assert all((tmp_path / figure["file"]).stat().st_size > 1000 for figure in figures)


def test_a_class_is_a_folder_below_the_one_that_was_given():
    """Somebody named glioma has pictures in the folder of her name, and in folders of classes."""
    real = images_of("data", {"glioma": 3, "healthy": 2, "": 2}, 0, folder="/data/glioma")
    measure = ByClass(["glioma", "healthy"], [])
    measure.check(Cohorts(real, None, []))
    assert measure.classes["data"] == ["glioma"] * 3 + ["healthy"] * 2 + [None] * 2


def test_a_table_of_classes_is_that_of_training(tmp_path):
    real, ours = images_of("real", {"": 5}, 0), images_of("ours", {"b": 2, "a": 2}, 1)
    held_out = replace(images_of("real", {"": 2}, 2), name=HELD_OUT, files=["/d/unseen/0.png", "/d/unseen/1.png"])
    held_out.folder = "/d/unseen"
    table = tmp_path / "classes.csv"
    rows = "0.png,a\n1.png,b\n/d/real/2.png,b\n3.png,a\n4.png,b\n"
    table.write_text("file,class\n" + rows)
    parser = ConfigParser()
    parser.read_config(ROOT / "configs/evaluate.json")
    parser.update({"class_names": ["a", "b"], "class_table": str(table)})
    measure = parser.get_parsed_content("measures#6")
    measure.check(Cohorts(replace(real, name="real"), held_out, [ours]))
    assert measure.classes["real"] == ["a", "b", "b", "a", "b"] and measure.classes["ours"] == ["b", "b", "a", "a"]
    assert measure.classes[HELD_OUT] == ["a", "b"]
    before = measure.settings
    table.write_text("file,class\n" + rows.replace("0.png,a\n1.png,b", "0.png,b\n1.png,a"))
    measure.check(Cohorts(real, held_out, [ours]))
    assert measure.settings["counts"] == before["counts"] and measure.settings != before  # the old rows are no use
    table.write_text("file,class\n" + rows.replace("4.png,b\n", ""))
    with pytest.raises(BundleError, match="class_table: 1 of 5 real images have no line in .*'/d/real//4.png"):
        measure.check(Cohorts(real, None, [ours]))


def test_a_class_without_real_images_is_named():
    with pytest.raises(BundleError, match="class_names: 0 real images are of the class 'star'"):
        ByClass(["round", "star"], []).check(Cohorts(images_of("real", {"round": 5}, 0), None, []))


# the commands


def test_class_folders_of_pictures_are_trained_on_sampled_and_evaluated(tmp_path):
    rng = np.random.default_rng(0)
    for side, count in (("train", 6), ("test", 3)):
        for of in ("disc", "ring"):
            (tmp_path / "data" / side / of).mkdir(parents=True)
            for i in range(count):
                y, x = np.mgrid[:24, :20] - rng.uniform(9, 12, (2, 1, 1))
                radius = np.hypot(y, x)
                bright = radius < 7 if of == "disc" else (radius < 7) & (radius > 4)
                page = np.where(bright, rng.integers(180, 255), 0) + rng.integers(0, 20, (24, 20))
                Image.fromarray(page.clip(0, 255).astype(np.uint8)).save(tmp_path / "data" / side / of / f"{i}.png")
    common = TINY | {"output_dir": tmp_path / "training", "ckpt_dir": tmp_path}
    intervals = {"val_interval": 3, "preview_interval": 3, "preview_samples": 4, "preview_steps": 2, "num_workers": 0}
    data = {"dataset_dir": tmp_path / "data/train", "max_iterations": 3, "batch_size": 4}
    done = run_bundle("run", "training", config_file=TRAIN, **common, **intervals, **data)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "training/dataset.json").read_text())
    assert len(summary["training"] + summary["validation"]) == 12
    assert summary["voxel_size_mm"]["median"] == [1.5, 1.5]  # 24 pixels of 1 mm in 16
    described = json.loads((tmp_path / "model.json").read_text())
    assert described["spatial_shape"] == [16, 16] and described["voxel_size"] == [1.5, 1.5]
    with Image.open(tmp_path / "training/previews/preview_00000003.png") as picture:
        assert picture.width == picture.height  # two images beside two

    samples = {"output_dir": tmp_path / "samples", "num_samples": 4, "num_inference_steps": 2}
    done = run_bundle("run", config_file=INFERENCE, **common | samples)
    assert done.returncode == 0, done.stderr
    found = sorted(path.name for path in (tmp_path / "samples").iterdir() if path.name not in (".lock", "samples.json"))
    assert found == ["mosaic.png", *(f"sample_seed0_volume{i:03d}.png" for i in range(4))]

    knobs = {"real_dir": tmp_path / "data/train", "held_out_dir": tmp_path / "data/test", "num_pairs": 10}
    knobs |= {"synthetic_dirs": tmp_path / "samples", "class_names": "['disc','ring']", "num_workers": 0}
    done = run_bundle("run", config_file=EVALUATE, spatial_shape="[16,16]", output_dir=tmp_path / "report", **knobs)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "report/metrics.csv", newline="") as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    assert {name: int(row["volumes"]) for name, row in rows.items()} == {"real": 12, "held-out": 6, "synthetic": 4}
    for metric in ("ms_ssim_kwon2019", "frechet_pca", "spectrum_high_frequency"):
        assert all(np.isfinite(float(rows["held-out"][f"{metric}{end}"])) for end in ("", "_disc", "_ring")), metric
    assert not any("tissue" in column for column in rows["real"])  # brains in 3D have tissues
    assert "disc: Samples" in (tmp_path / "report/report.html").read_text()

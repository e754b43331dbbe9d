"""Folders become cohorts on one grid, or a sentence that says why they cannot."""

import json
import logging

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT
from monai.bundle import ConfigParser
from monai.transforms import Compose

from scripts.evaluation.cohorts import load_cohorts, matching_label_maps, preprocessed_as, sources_of
from scripts.running.errors import BundleError


def save(path, volume, spacing=1.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(volume, np.float32), np.diag([spacing] * 3 + [1.0])), path)
    return str(path)


def blob(seed, shape=(16, 16, 16)):
    volume = np.zeros(shape)
    volume[3:-3, 3:-3, 3:-3] = np.random.default_rng(seed).uniform(50, 100, [s - 6 for s in shape])
    return volume


def folder(path, seeds, shape=(16, 16, 16)):
    for seed in seeds:
        save(path / f"v{seed}.nii.gz", blob(seed, shape))
    return str(path)


def plain(item):
    """A stand-in for the preprocessing: the file as it is, cut to 16 voxels a side, in [-1, 1]."""
    image = nib.load(item["image"])
    volume = torch.as_tensor(np.asarray(image.dataobj, np.float32)[:16, :16, :16] / 50 - 1)
    return {"image": volume[None].half(), "voxel_size": torch.tensor(image.header.get_zooms())}


def load(tmp_path, real, synthetic, held_out=None, **options):
    return load_cohorts(real, held_out, synthetic, Compose([plain]), str(tmp_path / "cache"), **options)


def test_volumes_files_and_voxel_sizes_stay_together(tmp_path):
    real = folder(tmp_path / "real", [2, 0, 1])
    held_out = folder(tmp_path / "held", [5, 6])
    cohorts = load(tmp_path, real, {"ours": folder(tmp_path / "ours", [7, 8]), "gan": real + "/../ours"}, held_out)
    assert [c.name for c in cohorts] == ["real", "held-out", "ours", "gan"] and [len(c) for c in cohorts] == [
        3,
        2,
        2,
        2,
    ]
    assert cohorts.real.volumes.dtype == np.float16 and cohorts.real.volumes.shape == (3, 16, 16, 16)
    assert cohorts.real.voxel_size.tolist() == [[1, 1, 1]] * 3
    for file, volume in zip(cohorts.real.files, cohorts.real.volumes):
        seed = int(file.split("/v")[-1][0])
        np.testing.assert_allclose(volume, blob(seed) / 50 - 1, atol=1e-3)


def test_one_folder_is_named_synthetic_and_dataset_json_names_the_held_out_files(tmp_path):
    files = [save(tmp_path / f"all/v{i}.nii.gz", blob(i)) for i in range(5)]
    split = tmp_path / "dataset.json"
    split.write_text(json.dumps({"training": files[:3], "validation": files[3:]}))
    cohorts = load(tmp_path, str(split), folder(tmp_path / "s", [8, 9]))
    assert [(c.name, len(c)) for c in cohorts] == [("real", 3), ("held-out", 2), ("synthetic", 2)]
    assert cohorts.real.files == files[:3]


def test_folders_of_other_shapes_are_resampled_and_said(tmp_path):
    cohorts = load(tmp_path, folder(tmp_path / "r", [0, 1]), folder(tmp_path / "s", [2, 3], (18, 20, 16)))
    assert cohorts.real.notes == []
    (note,) = cohorts.synthetic[0].notes
    assert "18 x 20 x 16 (2)" in note and "16 x 16 x 16" in note


def test_volumes_on_the_grid_are_not_cropped_and_resampled_again(tmp_path):
    def refuse(item):
        raise AssertionError("cropped again")

    real, synthetic = folder(tmp_path / "r", [0, 1], (18, 20, 16)), folder(tmp_path / "s", [2, 3])
    options = {"spatial_shape": [16, 16, 16], "transform_on_grid": Compose([plain])}
    cohorts = load(tmp_path, real, synthetic, **options)
    assert "were cropped and resampled" in cohorts.real.notes[0]
    assert "were not cropped or resampled" in cohorts.synthetic[0].notes[0]
    np.testing.assert_allclose(cohorts.synthetic[0].volumes[0], blob(2) / 50 - 1, atol=1e-3)
    named = {"a": synthetic, "b": synthetic}
    load_cohorts(synthetic, None, named, Compose([refuse]), str(tmp_path / "other"), **options)


def test_the_same_folder_twice_is_warned_of(tmp_path, caplog):
    real = folder(tmp_path / "r", [0, 1])
    with caplog.at_level(logging.WARNING):
        cohorts = load(tmp_path, real, {"copy": real})
    assert "every distance between them is zero" in caplog.text
    assert cohorts.synthetic[0].notes == [
        "real and copy hold the same volumes, so every distance between them is zero."
    ]


def test_max_volumes_takes_the_first(tmp_path):
    cohorts = load(tmp_path, folder(tmp_path / "r", range(5)), folder(tmp_path / "s", [8, 9]), max_volumes=2)
    assert [f[-9:] for f in cohorts.real.files] == ["v0.nii.gz", "v1.nii.gz"]


def test_label_maps_are_matched_by_name(tmp_path):
    real, synthetic = folder(tmp_path / "r", [0, 1, 10]), folder(tmp_path / "s", [2, 3])
    for name in ("v0_synthseg", "v10_synthseg"):
        save(tmp_path / f"labels/deep/{name}.nii.gz", blob(0) > 0)
    cohorts = load(tmp_path, real, synthetic, label_dirs={"real": str(tmp_path / "labels")})
    found = {f.split("/")[-1]: m.split("/")[-1] for f, m in zip(cohorts.real.files, cohorts.real.label_maps)}
    assert found == {"v0.nii.gz": "v0_synthseg.nii.gz", "v1.nii.gz": "", "v10.nii.gz": "v10_synthseg.nii.gz"}
    assert cohorts.real.notes == ["real: 1 of 3 volumes have no label map."]
    assert cohorts.synthetic[0].label_maps is None


@pytest.mark.parametrize(
    "real, synthetic, sentence",
    [
        ("nowhere", {"a": "two"}, "real_dir: .*nowhere.*no such folder"),
        ("two", {"a": "nowhere"}, r"synthetic_dirs\['a'\]: .*nowhere.*no such folder"),
        ("two", {}, "synthetic_dirs: {} was given"),
        ("two", 3, "synthetic_dirs: 3 was given"),
        ("two", {"real": "two"}, "the name 'real' is taken"),
        ("one", {"a": "two"}, "volumes: real has 1 in '.*one'; expected at least 2 usable"),
        ("two", {"a": "empty"}, "volumes: a has 0 in '.*empty'; expected at least 2 usable"),
        ("two", {"a": "text"}, "a volumes: 1 file of 3 cannot be used.*bad.nii.gz' cannot be read as a volume"),
    ],
)
def test_bad_folders_get_a_sentence(tmp_path, real, synthetic, sentence):
    folder(tmp_path / "two", [0, 1]), folder(tmp_path / "one", [0]), folder(tmp_path / "text", [0, 1])
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/picture.png").write_text("no volume")
    (tmp_path / "text/bad.nii.gz").write_text("subject,age")
    if isinstance(synthetic, dict):
        synthetic = {name: str(tmp_path / path) for name, path in synthetic.items()}
    with pytest.raises(BundleError, match=f"(?s){sentence}"):
        load(tmp_path, str(tmp_path / real), synthetic)
    if "text" in str(synthetic):
        assert len(load(tmp_path, str(tmp_path / real), synthetic, skip_bad_files=True).synthetic[0]) == 2


def test_bad_label_folders_get_a_sentence(tmp_path):
    files = [save(tmp_path / "r/v0.nii.gz", blob(0))]
    with pytest.raises(BundleError, match="no such folder"):
        matching_label_maps(files, str(tmp_path / "none"))
    (tmp_path / "maps").mkdir()
    with pytest.raises(BundleError, match="none of the 0 label maps .* v0_seg.nii.gz"):
        matching_label_maps(files, str(tmp_path / "maps"))
    save(tmp_path / "maps/v0_seg.nii.gz", blob(0)), save(tmp_path / "maps/v0_aseg.nii.gz", blob(0))
    with pytest.raises(BundleError, match="has 2 label maps"):
        matching_label_maps(files, str(tmp_path / "maps"))
    with pytest.raises(BundleError, match="no cohort named 'gan'"):
        load(tmp_path, folder(tmp_path / "a", [0, 1]), folder(tmp_path / "b", [2, 3]), label_dirs={"gan": "x"})


@pytest.mark.parametrize("text", ['{"train": []}', "[1]", '{"training": [], "validation": []}', "{"])
def test_a_dataset_json_of_another_kind_gets_a_sentence(tmp_path, text):
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(BundleError, match="not a dataset.json of a training run"):
        sources_of(str(tmp_path / "other.json"), None, {"a": str(tmp_path)})


def test_volumes_are_preprocessed_as_in_the_training_that_a_dataset_json_is_of(trained, tmp_path):
    path = str(trained / "dataset.json")
    assert preprocessed_as(path) == {"spatial_shape": [16, 16, 16], "crop_margin": 2, "percentiles": [0.5, 99.5]}
    assert preprocessed_as(str(tmp_path)) == {}
    for name in ("evaluate", "reader_study"):
        parser = ConfigParser()
        parser.read_config(str(ROOT / f"configs/{name}.json"))
        parser["real_dir"] = path
        assert parser.get_parsed_content("spatial_shape") == [16, 16, 16]
        parser["spatial_shape"] = [24, 24, 24]  # of the command line
        assert parser.get_parsed_content("spatial_shape") == [24, 24, 24]


@pytest.mark.parametrize("dataset_dir, expected", [("/data/glioma/d", "/data/glioma/d"), (None, "/data/glioma")])
def test_the_folder_of_a_training_is_that_of_its_dataset_json_or_what_all_its_files_share(
    tmp_path, dataset_dir, expected
):
    files = ["/data/glioma/scans/a.nii", "/data/glioma/more/b.nii"]
    split = {"training": files[:1], "validation": files[1:]} | ({"dataset_dir": dataset_dir} if dataset_dir else {})
    (tmp_path / "dataset.json").write_text(json.dumps(split))
    sources = sources_of(str(tmp_path / "dataset.json"), None, str(tmp_path))
    assert [(name, source.folder, source.files) for name, source in sources.items()] == [
        ("real", expected, files[:1]),
        ("held-out", expected, files[1:]),
        ("synthetic", str(tmp_path), None),
    ]


def test_a_pattern_is_of_the_real_folders_and_masks_are_left_out_of_all(tmp_path, caplog):
    real, ours = folder(tmp_path / "r", range(4)), folder(tmp_path / "s", [6, 7])
    for path in (tmp_path / "r/v0_mask.nii.gz", tmp_path / "s/v6_mask.nii.gz"):
        save(path, blob(0) > 0)
    cohorts = load(tmp_path, real, ours, image_pattern="v[012].nii.gz")
    assert [len(cohort) for cohort in cohorts] == [3, 2]
    assert "synthetic volumes: 1 of 3 files are taken for masks" in caplog.text


def test_a_reader_study_needs_no_held_out_volumes_and_counts_before_it_reads(tmp_path):
    files = [save(tmp_path / f"all/v{i}.nii.gz", blob(i)) for i in range(3)]
    split = tmp_path / "dataset.json"
    split.write_text(json.dumps({"training": files, "validation": []}))
    ours = folder(tmp_path / "s", [8, 9, 10])
    assert [cohort.name for cohort in load(tmp_path, str(split), ours, num_images=1)] == ["real", "synthetic"]
    (tmp_path / "s/v9.nii.gz").write_text("no volume")
    with pytest.raises(BundleError, match="num_images: 4 .* real has 3 .*json', synthetic has 3 .*s'; expected fewer"):
        load(tmp_path, str(split), ours, num_images=4)
    with pytest.raises(BundleError, match="num_images: 2 of each .* but real has 1 in"):
        load(tmp_path, str(split), ours, num_images=2, max_volumes=1)
    with pytest.raises(BundleError, match="num_images: 3 of each .* but synthetic has 2 in"):
        load(tmp_path, str(split), ours, num_images=3, skip_bad_files=True)

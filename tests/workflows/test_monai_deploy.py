"""docs/monai_deploy.md: its DICOM series, read by others; and what inference.json finds when Deploy reads it."""

import ast
import json
import re
import subprocess
import sys

import nibabel as nib
import numpy as np
import pydicom
import pytest
from conftest import ROOT, TINY_NETWORK
from monai.bundle import ConfigParser
from monai.data import PydicomReader

PAGE = (ROOT / "docs/monai_deploy.md").read_text()
BLOCKS = dict(re.findall(r"`(\w+\.py)`:\n\n```python\n(.*?)```", PAGE, re.S))
METADATA = json.loads((ROOT / "configs/metadata.json").read_text())


@pytest.fixture
def write_series():
    names = {}
    exec(compile(BLOCKS["dicom_series.py"], "dicom_series.py", "exec"), names)
    return names["write_series"]


def oblique():
    """Axes of the array point back, up and right, tilted by 10 degrees; voxels of 1.1 x 2.3 x 3.7 mm."""
    c, s = np.cos(np.pi / 18), np.sin(np.pi / 18)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[0, 0, 1], [-1, 0, 0], [0, 1, 0]])
    return nib.affines.from_matvec(turn @ np.diag([1.1, 2.3, 3.7]), [10, -20, 30])


@pytest.mark.parametrize(
    "affine", [nib.affines.from_matvec(np.diag([5.258100032806396] * 3), [-7.9, -10.5, -13.1]), oblique()]
)
def test_every_voxel_of_the_series_lies_where_it_lies_in_the_nifti(write_series, tmp_path, affine):
    volume = np.arange(4 * 5 * 6, dtype=np.uint8).reshape(4, 5, 6)
    write_series(volume, affine, tmp_path / "series", METADATA, "seed 0, volume 0")
    reader = PydicomReader()  # turns LPS into RAS
    voxels, meta = reader.get_data(reader.read(str(tmp_path / "series")))
    assert sorted(voxels.ravel()) == list(range(120))
    for index in np.ndindex(voxels.shape):
        place = np.linalg.solve(affine, meta["affine"] @ [*index, 1])[:3]
        np.testing.assert_allclose(place, place.round(), atol=1e-6)
        assert voxels[index] == volume[tuple(place.round().astype(int))]


def test_every_header_is_valid_and_says_that_the_image_is_synthetic(write_series, tmp_path, monkeypatch):
    monkeypatch.setattr(pydicom.config.settings, "writing_validation_mode", pydicom.config.RAISE)
    monkeypatch.setattr(pydicom.config.settings, "reading_validation_mode", pydicom.config.RAISE)
    write_series(np.zeros((4, 5, 6), np.uint8), np.eye(4), tmp_path, METADATA, "seed 0, volume 123")
    images = [pydicom.dcmread(path) for path in sorted(tmp_path.iterdir())]
    assert len(images) == 6 and len({image.SOPInstanceUID for image in images}) == 6
    for key in ("StudyInstanceUID", "SeriesInstanceUID", "FrameOfReferenceUID", "PatientID"):
        assert len({image[key].value for image in images}) == 1
    for image in images:
        for element in image.iterall():  # every value is read, so every value is checked
            assert element.VR != "UI" or pydicom.uid.UID(element.value).is_valid
        assert image.SyntheticData == "YES" and image.ConversionType == "SYN"
        assert image.ImageType[:2] == ["DERIVED", "SECONDARY"] and image.Modality != "MR"
        assert all("SYNTHETIC" in str(image[key].value) for key in ("PatientName", "PatientID", "SeriesDescription"))
        (maker,) = image.ContributingEquipmentSequence
        assert maker.PurposeOfReferenceCodeSequence[0].CodeMeaning == "Synthesizing Equipment"
        assert maker.SoftwareVersions == METADATA["version"]


def test_a_folder_that_deploy_puts_on_the_module_path_is_read_with_what_stands_beside_its_weights(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)  # bundle_root stays "."
    monkeypatch.syspath_prepend(str(ROOT))
    other = tmp_path / "other"  # a folder of the module path that has a model of its own, before the bundle's
    (other / "models").mkdir(parents=True)
    (other / "models/model.json").write_text('{"prediction_type": "sample", "voxel_size": [9, 9, 9]}')
    monkeypatch.setattr("sys.path", [str(other), *sys.path])
    described = json.loads((ROOT / "models/model.json").read_text())
    (tmp_path / "velocity.pt").touch()
    for knobs, expected in (({}, described), ({"ckpt_path": "velocity.pt"}, {})):
        parser = ConfigParser()
        parser.read_config(str(ROOT / "configs/inference.json"))
        parser.update(knobs)
        assert parser.get_parsed_content("description") == expected


ONE_VOLUME = """
import ast, sys
sys.modules.update(dict.fromkeys(sys.argv[2:]))
from monai.bundle import ConfigParser
parser = ConfigParser()
parser.read_config("configs/inference.json")
parser.update(ast.literal_eval(sys.argv[1]))
noise = parser.get_parsed_content("preprocessing")({"image": 0})["image"]
volume = parser.get_parsed_content("inferer")(noise[None], parser.get_parsed_content("network_def"))
volume = parser.get_parsed_content("postprocessing")({"pred": volume[0]})["pred"]
print(tuple(volume.shape), float(volume.min()) >= 0, float(volume.max()) <= 255)
"""


def test_a_volume_is_sampled_with_the_packages_that_deploy_has():
    missing = ["ignite", "fire", "tqdm", "matplotlib", "scipy", "sklearn", "tensorboard", "safetensors", "mlflow"]
    missing += ["huggingface_hub", "transformers"]  # MONAI would import them where they are
    knobs = {key: ast.literal_eval(value) for key, value in TINY_NETWORK.items()} | {"num_inference_steps": 2}
    command = [sys.executable, "-W", "ignore", "-c", ONE_VOLUME, repr(knobs), *missing]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=300)
    assert done.stdout == "(1, 16, 16, 16) True True\n", done.stderr

"""The snippets of docs/python.md run as they stand there, one after the other, in a copy of the bundle."""

import re
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from conftest import ROOT, quiet

SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(), re.S)
SMALLER = {  # or it would take minutes
    "max_iterations=250": "max_iterations=2, preview_steps=2, preview_samples=1",
    "num_inference_steps=10": "num_inference_steps=2",
    "num_pairs=100": "num_pairs=3, max_volumes=4",
}


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """Folder of a bundle in which the snippets ran; what they left in their variables is in variables.npz."""
    bundle = tmp_path_factory.mktemp("python") / "brain_mri_ddpm_3d"
    for part in ("configs", "scripts", "models"):
        shutil.copytree(ROOT / part, bundle / part, ignore=shutil.ignore_patterns("__pycache__", "*.ts"))
    code = "\n".join(SNIPPETS)
    for shown, smaller in SMALLER.items():
        assert code.count(shown) == 1, shown
        code = code.replace(shown, smaller)
    code += "\nimport numpy as np\nwith_channel = volume.numpy()\n"
    names = ("voxels", "affine", "volumes", "last_loss", "distance", "with_channel")
    code += f"np.savez('variables.npz', {', '.join(f'{name}={name}' for name in names)})\n"
    done = subprocess.run([sys.executable, "-"], input=code, cwd=bundle, env=quiet(), text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return bundle


def test_three_lines_are_the_volume_that_the_command_line_writes(notebook):
    left = np.load(notebook / "variables.npz")
    image = nib.load(notebook / "output/samples/sample_seed7_volume000.nii.gz")
    assert left["with_channel"].shape == (1, 64, 64, 64) and left["voxels"].dtype == np.float32
    assert left["voxels"].min() >= 0 and left["voxels"].max() <= 255 and left["voxels"].std() > 10
    np.testing.assert_array_equal(left["voxels"], np.asarray(image.dataobj))
    np.testing.assert_allclose(left["affine"], image.affine, atol=1e-4)


def test_several_volumes_come_at_once(notebook):
    volumes = np.load(notebook / "variables.npz")["volumes"]
    files = sorted(notebook.glob("output/samples/sample_seed8_*.nii.gz"))
    assert len(files) == 2 and volumes.shape == (2, 1, 64, 64, 64)
    np.testing.assert_array_equal(volumes[:, 0], [np.asarray(nib.load(path).dataobj) for path in files])


def test_training_and_evaluation_leave_their_numbers_in_the_variables(notebook):
    left = np.load(notebook / "variables.npz")
    last = (notebook / "output/demo/loss.csv").read_text().splitlines()[-1]
    assert last == f"2,1,{float(left['last_loss'])!r}"
    header, *rows = [line.split(",") for line in (notebook / "output/evaluation/metrics.csv").read_text().splitlines()]
    first = dict(zip(header, next(row for row in rows if row[0] == "first")))
    assert float(first["frechet_pca"]) == float(left["distance"]) > 0

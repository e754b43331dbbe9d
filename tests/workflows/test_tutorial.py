"""docs/tutorial.ipynb, run whole at tiny size by the program that runs notebooks."""

import json
import shutil

import nbformat
import pytest
from conftest import ROOT, TINY_TRAINING
from nbclient import NotebookClient

NOTEBOOK = ROOT / "docs/tutorial.ipynb"


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The notebook, run in a copy of the bundle; its one cell for one's own scans names tiny ones."""
    bundle = tmp_path_factory.mktemp("tutorial") / "bundle"
    for part in ("configs", "scripts", "docs"):
        shutil.copytree(ROOT / part, bundle / part, ignore=shutil.ignore_patterns("__pycache__"))
    tiny = {key: eval(value) for key, value in TINY_TRAINING.items() if key not in ("max_iterations", "val_interval")}
    tiny |= {"norm_num_groups": 4, "preview_interval": 2, "crop_margin": 2, "val_fraction": 0.3}
    (bundle / "configs/presets/tiny.json").write_text(json.dumps(tiny))
    notebook = nbformat.read(bundle / "docs/tutorial.ipynb", 4)
    own = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    own.source = own.source.replace('"demo_covariates"]', '"demo_covariates", "tiny"]').replace("800", "4")
    for cell in notebook.cells:
        cell.source = cell.source.replace("num_subjects=128", "num_subjects=12, spatial_shape=(20, 20, 20)")
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(bundle / "docs")}}).execute()
    return bundle / "output/tutorial", notebook


def test_every_step_leaves_what_the_next_one_shows(ran):
    output, notebook = ran
    for left in ("training/brains.png", "samples/mosaic.png", "asked/samples.csv", "evaluation/report.html"):
        assert (output / left).stat().st_size > 0
    pictures = [
        o for c in notebook.cells if c.cell_type == "code" for o in c.outputs if "image/png" in o.get("data", {})
    ]
    assert len(pictures) == 8
    text = "".join(o.get("text", "") for c in notebook.cells if c.cell_type == "code" for o in c.outputs)
    assert "12 scans" in text and "volume 0, age 20" in text and "ms_ssim_kwon2019" in text and "error" not in text


def test_the_stored_notebook_has_its_pictures_and_is_small():
    notebook = nbformat.read(NOTEBOOK, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code) and NOTEBOOK.stat().st_size <= 1_500_000
    assert all(len(cell.source.splitlines()) <= 12 for cell in notebook.cells)
    assert sum("image/png" in output.get("data", {}) for cell in code for output in cell.outputs) == 8
    assert str(ROOT.parent) not in NOTEBOOK.read_text()

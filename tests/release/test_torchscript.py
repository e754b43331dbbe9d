"""model.ts: one file that another program runs on its own."""

import ast
import json
import re
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_NETWORK, run_bundle
from monai.bundle import ConfigParser
from monai.data import MetaTensor, load_net_with_metadata

from scripts.diffusion.weights import load_weights
from scripts.release.torchscript import export_torchscript
from scripts.running.errors import root_bundle_error

KNOBS = {key: ast.literal_eval(value) for key, value in TINY_NETWORK.items()} | {"num_inference_steps": 2}


@pytest.fixture(scope="module")
def archive(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("archive") / "model.ts"
    places = {"ckpt_path": trained / "models/model.pt", "torchscript_path": path}
    done = run_bundle("run", "torchscript", config_file="configs/export.json", knobs=KNOBS, **places)
    assert done.returncode == 0, done.stderr
    assert [file.name for file in path.parent.iterdir()] == ["model.ts"]
    return path


def test_the_archive_samples_what_the_eager_sampler_does(archive, trained):
    parser = ConfigParser()
    parser.read_config(str(ROOT / "configs/inference.json"))
    weights = str(trained / "models/model.pt")
    parser.update(KNOBS | {"amp": "float32", "ckpt_path": weights})
    eager = parser.get_parsed_content("network_def")
    load_weights(eager, weights)
    noise = torch.randn(2, 1, 16, 16, 16)
    torch.testing.assert_close(torch.jit.load(archive)(noise), eager(noise), atol=1e-5, rtol=0)


def test_the_archive_names_no_device(archive):
    with zipfile.ZipFile(archive) as file:
        code = [file.read(name).decode() for name in file.namelist() if name.endswith(".py")]
    assert code and not any(re.search(r"torch\.device\(\"", text) for text in code)


def test_the_archive_needs_nothing_beside_it(archive, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, metadata, files = load_net_with_metadata(str(archive), more_extra_files=["inference.json"])
    assert metadata == json.loads((ROOT / "configs/metadata.json").read_text())
    text = files["inference.json"].decode()
    assert str(trained) not in text and str(ROOT) not in text
    parser = ConfigParser(json.loads(text))
    assert {key: parser[key] for key in KNOBS} == KNOBS
    # as MONAI Deploy asks for a volume: a tensor with metadata
    order = MetaTensor(torch.zeros(1, 1, 1), meta={"seed": 7, "volume": 3})
    noise = parser.get_parsed_content("preprocessing")({"image": order})["image"]
    seed = int(np.random.SeedSequence([7, 3]).generate_state(1, np.uint64)[0])
    assert torch.equal(noise.as_tensor(), torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(seed)))
    assert (noise.meta["seed"], noise.meta["volume"]) == (7, 3)
    voxel_size = json.loads((trained / "models/model.json").read_text())["voxel_size"]
    np.testing.assert_allclose(noise.pixdim, voxel_size, rtol=1e-6)
    assert min(voxel_size) > 1.5


def test_knobs_that_cannot_be_are_refused_before_anything_is_written(trained, tmp_path):
    places = [str(ROOT / "configs" / name) for name in ("inference.json", "metadata.json")]
    weights = str(trained / "models/model.pt")
    with pytest.raises(Exception) as raised:
        export_torchscript(weights, str(tmp_path / "model.ts"), *places, knobs=KNOBS | {"schedule": "cosinus"})
    assert "'cosinus' is unknown" in str(root_bundle_error(raised.value)) and not list(tmp_path.iterdir())

"""ONNX and TensorRT: the U-Net as other runtimes take it."""

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_NETWORK, run_bundle, small_unet
from monai.bundle import ConfigParser
from monai.networks.trt_compiler import TrtCompiler
from onnxruntime import InferenceSession


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Random ones: the output of a network that was hardly trained is nearly zero, and so would every difference be."""
    path = tmp_path_factory.mktemp("weights") / "model.pt"
    torch.save(small_unet().state_dict(), path)
    return path


def assert_same_as_eager(model: Path, batch: int, sides: tuple[int, int, int]) -> None:
    session = InferenceSession(model, providers=["CPUExecutionProvider"])
    x, timesteps = torch.randn(batch, 1, *sides), torch.randint(0, 250, (batch,)).float()
    found = session.run(None, {"x": x.numpy(), "timesteps": timesteps.numpy()})
    with torch.no_grad():
        wanted = small_unet()(x, timesteps)
    assert wanted.std() > 0.01
    np.testing.assert_allclose(found[0], wanted, atol=1e-5, rtol=0)


def test_the_onnx_network_is_the_eager_one_for_other_batches_timesteps_and_sizes(weights, tmp_path):
    places = {"ckpt_path": weights, "onnx_path": tmp_path / "model.onnx"}
    knobs = {key: ast.literal_eval(value) for key, value in TINY_NETWORK.items()}
    done = run_bundle("run", "onnx", config_file="configs/export.json", knobs=knobs, **places)
    assert done.returncode == 0, done.stderr
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
    for batch, sides in ((1, (16, 16, 16)), (3, (16, 16, 16)), (2, (8, 16, 24))):
        assert_same_as_eager(tmp_path / "model.onnx", batch, sides)


def tiny_inference(*overlays: str, **knobs: object) -> ConfigParser:
    parser = ConfigParser()
    parser.read_config([str(ROOT / "configs" / name) for name in ("inference.json", *overlays)])
    parser.update({key: ast.literal_eval(value) for key, value in TINY_NETWORK.items()} | knobs)
    return parser


def test_what_tensorrt_is_given_is_the_eager_network(tmp_path, monkeypatch):
    """All of MONAI's `trt_compile` but TensorRT, which needs a GPU: in place of its engine the ONNX file is kept."""
    trt_args = tiny_inference("inference_trt.json", batch_size=3).get_parsed_content("trt_args")
    monkeypatch.setattr(TrtCompiler, "_onnx_to_trt", lambda self, path: Path(path).read_bytes())
    network = small_unet()
    compiler = TrtCompiler(network, str(tmp_path / "model.onnx"), **trt_args)
    example = {"x": torch.randn(1, 1, 16, 16, 16), "timesteps": torch.tensor([3.0])}
    compiler._build_and_save(network, compiler.defaults | example)
    assert compiler.profiles[0]["x"] == [[batch, 1, 16, 16, 16] for batch in (1, 3, 3)]
    for batch in (1, 3):
        assert_same_as_eager(tmp_path / "model.onnx", batch, (16, 16, 16))


def test_without_tensorrt_the_overlay_samples_as_ever(weights):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU: the overlay may build an engine")
    noise, volumes = torch.randn(1, 1, 16, 16, 16), []
    for overlays in ((), ("inference_trt.json",)):
        parser = tiny_inference(*overlays, amp="float32", num_inference_steps=2, ckpt_path=str(weights))
        parser.get_parsed_content("initialize")
        volumes.append(parser.get_parsed_content("network")(noise))
    assert torch.equal(*volumes)

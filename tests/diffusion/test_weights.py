"""Weights in any layout, what describes them, and what is refused, each in one sentence."""

import argparse
import json
import pickle
import re

import pytest
import safetensors.torch
import torch
from conftest import ROOT, small_unet, workflow
from torch import nn
from torch.optim.swa_utils import AveragedModel

from scripts.diffusion import weights
from scripts.diffusion.description import DESCRIBING
from scripts.diffusion.sampler import DiffusionSampler
from scripts.running.errors import BundleError, root_bundle_error
from scripts.training.start import begin_with


def as_old_names(state_dict):
    """The names that monai-generative 0.2 gave to the same tensors, with the projection that it never applied."""
    old = {}
    for name, tensor in state_dict.items():
        old[re.sub(r"\.attn\.(to_[qkv])", r".\1", name).replace("postconv", "conv")] = tensor
        if name.endswith(".attn.to_v.weight"):
            old[name.replace(".attn.to_v.weight", ".proj_attn.weight")] = torch.randn_like(tensor)
            old[name.replace(".attn.to_v.weight", ".proj_attn.bias")] = torch.randn(len(tensor))
    return old


@pytest.fixture(scope="module")
def network():
    return small_unet(include_fc=False, use_combined_linear=False)


def zeros(state_dict):
    return {name: torch.zeros_like(tensor) for name, tensor in state_dict.items()}


def prefixed(prefix, state_dict):
    return {prefix + name: tensor for name, tensor in state_dict.items()}


def spoiled(state_dict, value):
    return {n: torch.full_like(t, value) if n == "out.2.conv.bias" else t for n, t in state_dict.items()}


def optimizer_of(network):
    optimizer = torch.optim.Adam(network.parameters())
    sum(parameter.sum() for parameter in network.parameters()).backward()
    optimizer.step()
    network.zero_grad()
    return optimizer.state_dict()


def a_model(unet):
    """Of a user's own program: the network below another module, compiled."""
    outer = nn.Module()
    outer.model = nn.Module()
    outer.model.unet = torch.compile(unet)
    return outer


# what a file holds, as a function of the network and its state dict
RIGHT = {
    "plain": lambda net, sd: sd,
    "model, as MedForj": lambda net, sd: {"model": sd},
    "state_dict": lambda net, sd: {"state_dict": sd, "epoch": 3, "args": {"lr": 1e-4}},
    "ema alone": lambda net, sd: {"ema": sd, "decay": 0.99},
    "model_state_dict with its optimizer": lambda net, sd: {
        "model_state_dict": sd,
        "optimizer_state_dict": optimizer_of(small_unet()),
    },
    "state_dict and state_dict_ema, as timm": lambda net, sd: {"state_dict": zeros(sd), "state_dict_ema": sd},
    "model and ema": lambda net, sd: {"model": zeros(sd), "ema": sd, "step": torch.tensor(3)},
    "nested": lambda net, sd: {"checkpoint": {"model": {"state_dict": sd}}},
    "module., of DataParallel": lambda net, sd: nn.DataParallel(net).state_dict(),
    "_orig_mod., of torch.compile": lambda net, sd: torch.compile(net).state_dict(),
    "unet., of a sampler": lambda net, sd: prefixed("unet.", sd),
    "model.unet._orig_mod., of Lightning": lambda net, sd: {"state_dict": a_model(net).state_dict(), "epoch": 1},
    "_orig_mod. inside": lambda net, sd: {n.replace("blocks.0.", "blocks.0._orig_mod."): t for n, t in sd.items()},
    "AveragedModel": lambda net, sd: AveragedModel(net).state_dict(),
    "ema of a checkpoint": lambda net, sd: {"network": zeros(sd), "ema": sd, "iteration": 3},
    "raw of a checkpoint": lambda net, sd: {"network": sd, "ema": zeros(sd), "iteration": 3},
    "monai-generative": lambda net, sd: as_old_names(sd),
    "monai-generative, wrapped": lambda net, sd: {"unet": prefixed("module.", as_old_names(sd)), "x": torch.ones(1)},
    "safetensors": None,
    "before zip files": None,
}
WRONG = {
    "a whole module": (lambda net, sd: net, "holds objects that are not tensors .*; save its state_dict alone"),
    "a namespace": (
        lambda net, sd: {"model": sd, "args": argparse.Namespace(lr=1e-4)},
        r"holds objects that are not tensors \(argparse.Namespace\); save its state_dict alone",
    ),
    "a namespace, before zip files": (None, r"not tensors \(argparse.Namespace\); save its state_dict alone"),
    "NaN": (lambda net, sd: spoiled(sd, float("nan")), r"infinite weights in 1 of \d+ tensors \(out.2.conv.bias\)"),
    "infinite": (lambda net, sd: {"ema": spoiled(sd, -float("inf"))}, "NaN or infinite weights in 1 of .*out.2.conv"),
    "two networks": (
        lambda net, sd: {"generator": sd, "discriminator": zeros(sd), "epoch": 3},
        r"holds 2 state dicts \(generator, discriminator\) where one .*keys are: 'generator', 'discriminator', 'epoch'",
    ),
    "two averages": (lambda net, sd: {"ema_1": sd, "ema_2": sd}, r"holds 2 state dicts \(ema_1, ema_2\) where one"),
    "an average, raw": (lambda net, sd: {"ema": sd}, r"holds no state dict .* .weights = 'raw'.; its keys are: 'ema'"),
    "two prefixes": (
        lambda net, sd: prefixed("online.", sd) | prefixed("ema.", sd),
        "another kind of network: its .* tensors are named online.conv_in.conv.weight, .*; those of this config",
    ),
    "settings": (lambda net, sd: {"epoch": 3, "lr": 1e-4}, "holds no state dict .*; its keys are: 'epoch', 'lr'"),
    "nothing": (lambda net, sd: {}, "holds no state dict .*; its keys are: none"),
    "a list": (lambda net, sd: list(sd.values()), "holds a list; expected a state dict"),
    "another network": (lambda net, sd: nn.Linear(2, 2).state_dict(), "another kind of network: its 2 tensors"),
    "other tensors": (lambda net, sd: dict(list(sd.items())[1:]), "1 tensors differ"),
    "an empty file": (None, r"cannot be read as PyTorch weights \(EOFError\); it may be truncated or of another kind"),
    "a text file": (None, "cannot be read as PyTorch weights .*; it may be truncated or of another kind"),
    "a torn file": (None, "cannot be read as PyTorch weights .*; it may be truncated or of another kind"),
    "a torn safetensors file": (None, "cannot be read as PyTorch weights .*; it may be truncated or of another kind"),
    "a plain pickle": (None, "cannot be read as PyTorch weights .*; it may be truncated or of another kind"),
}


def write(layout, content, state_dict, folder):
    """The file of a layout."""
    path = folder / ("model.safetensors" if "safetensors" in layout else "model.pt")
    if layout == "before zip files":
        torch.save(state_dict, path, _use_new_zipfile_serialization=False)
    elif layout == "a namespace, before zip files":
        torch.save({"model": state_dict, "a": argparse.Namespace()}, path, _use_new_zipfile_serialization=False)
    elif "safetensors" in layout:
        safetensors.torch.save_file(state_dict, path)
    elif layout in ("a text file", "an empty file"):
        path.write_text("these are my weights\n" if layout == "a text file" else "")
    elif layout == "a plain pickle":
        path.write_bytes(pickle.dumps({"weight": [1.0]}))
    else:
        torch.save(state_dict if content is None else content, path)
    if layout.startswith("a torn"):
        path.write_bytes(path.read_bytes()[:1000])
    return str(path)


@pytest.mark.parametrize("layout", RIGHT)
def test_every_layout_gives_the_same_network(tmp_path, network, scheduler, layout):
    state_dict = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    content = RIGHT[layout] and RIGHT[layout](network, state_dict)
    path = write(layout, content, state_dict, tmp_path)
    loaded = small_unet(include_fc=False, use_combined_linear=False)
    loaded.load_state_dict(zeros(state_dict))
    sampler = DiffusionSampler(loaded, scheduler, 2)
    weights.load_weights(sampler, path, "raw" if layout.startswith("raw") else "ema")
    x, t = torch.randn(1, 1, 8, 8, 8), torch.tensor([3.0])
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, t), network(x, t), atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", WRONG)
def test_what_holds_no_weights_of_the_network_is_refused_in_one_sentence(tmp_path, network, layout):
    state_dict = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    make, words = WRONG[layout]
    path = write(layout, make and make(network, state_dict), state_dict, tmp_path)
    before = {name: tensor.clone() for name, tensor in state_dict.items()}
    with pytest.raises(BundleError, match=words) as error:
        weights.load_weights(network, path, "raw" if layout.endswith("raw") else "ema")
    said = str(error.value)
    assert repr(path) in said and "\x1b" not in said and said.count("\n") == (layout == "other tensors")
    assert len(said) < 600 and "weights_only" not in said
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_missing_weights_say_which_command_makes_them(tmp_path, unet):
    with pytest.raises(BundleError, match="ckpt_path: there are no weights at .*monai.bundle run training"):
        weights.load_weights(unet, str(tmp_path / "model.pt"))


def test_an_unknown_kind_of_weights_is_refused(tmp_path, unet):
    torch.save(unet.state_dict(), tmp_path / "model.pt")
    with pytest.raises(BundleError, match="weights: 'averaged' is unknown"):
        weights.load_weights(unet, str(tmp_path / "model.pt"), "averaged")


def test_an_old_network_needs_the_old_attention(tmp_path, unet, network):
    torch.save(as_old_names(network.state_dict()), tmp_path / "model.pt")
    with pytest.raises(BundleError, match="monai-generative.*include_fc false"):
        weights.load_weights(unet, str(tmp_path / "model.pt"))


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, unet):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"weight": Malicious()}, tmp_path / "model.pt")
    with pytest.raises(BundleError, match="cannot be read as PyTorch weights: it holds objects"):
        weights.load_weights(unet, str(tmp_path / "model.pt"))
    assert not (tmp_path / "executed").exists()


def test_tensors_of_another_network_are_named(tmp_path, unet):
    state = unet.state_dict()
    state["conv_in.conv.weight"] = torch.zeros(16, 1, 3, 3, 3)
    del state["out.0.weight"]
    state["extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(BundleError) as error:
        weights.load_weights(unet, str(tmp_path / "model.pt"))
    for part in (
        "3 tensors differ",
        "conv_in.conv.weight: found (16, 1, 3, 3, 3), the network has (8, 1, 3, 3, 3)",
        "out.0.weight: found nothing",
        "extra: found (1,), the network has nothing",
    ):
        assert part in str(error.value)


# what describes weights


def test_the_configs_say_all_that_describes_weights(trained, tmp_path):
    for name, without in (("train", "voxel_size"), ("inference", "timestep_sampling")):
        knobs = {"ckpt_path": str(trained / "models/model.pt")} if name == "inference" else {}
        known = workflow(name, tmp_path / name, **knobs).parser.get_parsed_content("weights_description")
        assert list(known) == [key for key in DESCRIBING if key != without]
        assert known["scheduler"] == "DDPMScheduler" and known["num_train_timesteps"] == 10


KNOWN = {
    "spatial_shape": [16, 16, 16],
    "voxel_size": [2.0, 2.0, 2.0],
    "num_head_channels": [0, 8],
    "scheduler": "DDPMScheduler",
    "num_train_timesteps": 10,
    "schedule": "cosine",
    "prediction_type": "flow",
    "class_names": None,
}


@pytest.mark.parametrize("name", ["model.pt", "model.safetensors"])
def test_a_description_travels_in_the_file_and_plain_torch_takes_no_notice(tmp_path, unet, name):
    path = str(tmp_path / name)
    weights.save_weights(unet.state_dict(), KNOWN, path)
    assert weights.described(path) == KNOWN
    if name == "model.pt":
        for weights_only in (True, False):
            content = torch.load(path, weights_only=weights_only)
            assert list(content) == list(unet.state_dict())
            small_unet().load_state_dict(content)
            small_unet().load_state_dict(content, assign=True)
        torch.save(content, tmp_path / "again.pt")  # as a user would who copies weights
        assert weights.described(str(tmp_path / "again.pt")) == KNOWN
    else:
        assert list(safetensors.torch.load_file(path)) == sorted(unet.state_dict())
    with pytest.raises(BundleError, match="prediction_type: 'epsilon' was given, but .* was trained with 'flow'; give"):
        weights.load_weights(unet, path, expected={"prediction_type": "epsilon"})
    weights.load_weights(unet, path, expected=KNOWN | {"spatial_shape": [32, 32, 32], "voxel_size": [1.0, 1.0, 1.0]})


@pytest.mark.parametrize("label", [None, {"json": "["}, {"json": "[1]"}, {"json": 3}, {}, "flow"])
def test_a_file_of_strangers_may_call_anything_its_description(tmp_path, unet, label):
    state_dict = unet.state_dict()
    state_dict._metadata["description"] = label
    torch.save(state_dict, tmp_path / "model.pt")
    assert weights.described(str(tmp_path / "model.pt")) == {}
    weights.load_weights(unet, str(tmp_path / "model.pt"))


def test_a_json_file_beside_weights_describes_those_that_say_nothing(tmp_path, unet, caplog):
    path = str(tmp_path / "model.pt")
    torch.save(unet.state_dict(), path)
    (tmp_path / "model.json").write_text('{"prediction_type": "epsilon", "iteration": 3}')
    weights.load_weights(unet, path, expected={"prediction_type": "epsilon"})
    with pytest.raises(BundleError, match="prediction_type: 'sample' was given, but .* was trained with 'epsilon'"):
        weights.load_weights(unet, path, expected={"prediction_type": "sample"})
    older = {"prediction_type": "epsilon", "network_class": "scripts.diffusion.networks.ConvNeXtUNet"}
    with pytest.raises(BundleError, match="network_class: .* was trained with 'DiffusionModelUNet'"):
        weights.load_weights(unet, path, expected=older)  # before there was another one, nobody wrote it down
    assert caplog.text == ""
    weights.save_weights(unet.state_dict(), KNOWN, path)
    assert weights.described(path) == KNOWN  # a JSON file of other weights, which were here before
    assert "model.json' is not of" in caplog.text and "prediction_type 'epsilon' (it is 'flow')" in caplog.text
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(BundleError, match="model.json', beside weights of that name, is no JSON"):
        weights.described(path)


def assumed(caplog):
    """The knobs that the only warning names as assumptions, as a text."""
    (record,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert "does not say how it was trained, and no JSON file beside it does" in record.message
    return record.message.split("taken as the config has them: ")[1].split(". Where")[0]


def test_without_a_description_each_assumption_is_named(tmp_path, unet, caplog):
    path = str(tmp_path / "model.pt")
    torch.save(unet.state_dict(), path)
    expected = KNOWN | {"channels": [8, 8], "num_res_blocks": 1}  # tensors show these two
    weights.load_weights(unet, path, expected=expected)
    assert assumed(caplog) == ", ".join(f"{key} {value!r}" for key, value in KNOWN.items())
    caplog.clear()
    (tmp_path / "model.json").write_text(json.dumps(KNOWN))
    weights.load_weights(unet, path, expected=expected)
    assert caplog.records == []
    # a training may go on at another size: nothing is assumed about it
    begin_with(path, unet, small_unet(), expected | {"norm_num_groups": 8, "spatial_shape": [32, 32, 32]})
    assert assumed(caplog) == "norm_num_groups 8"


def test_weights_without_their_json_file_are_sampled_as_they_were_trained(tmp_path, unet, caplog):
    """In the commands that the configs build: another folder, another name, and no JSON file beside."""
    described, alone = str(tmp_path / "mine.pt"), str(tmp_path / "alone.pt")
    weights.save_weights(unet.state_dict(), KNOWN | {"voxel_size": [3.0, 3.0, 3.0]}, described)
    torch.save(dict(unet.state_dict()), alone)
    run = workflow("inference", tmp_path / "out", ckpt_path=described, num_inference_steps=2)
    assert run.parser.get_parsed_content("prediction_type") == "flow"
    assert run.parser.get_parsed_content("voxel_size") == [3.0, 3.0, 3.0]
    assert "norm_num_groups 8" in caplog.text and "prediction_type 'flow'" not in caplog.text
    with pytest.raises(Exception) as error:
        workflow("inference", tmp_path / "out", ckpt_path=described, prediction_type="sample", num_inference_steps=2)
    assert "prediction_type: 'sample' was given, but" in str(root_bundle_error(error.value))
    caplog.clear()
    workflow("inference", tmp_path / "out", ckpt_path=alone, num_inference_steps=2)
    assert "prediction_type 'epsilon'" in caplog.text and "voxel_size [1.0, 1.0, 1.0]" in caplog.text


def test_the_weights_that_come_with_the_bundle_say_all_that_describes_them():
    path = str(ROOT / "models/model.pt")
    beside = json.loads((ROOT / "models/model.json").read_text())
    assert weights.described(path) == beside and set(DESCRIBING) <= set(beside)


def test_released_weights_are_the_average_in_half_the_bytes(tmp_path, unet):
    ema = {name: t + 1 for name, t in unet.state_dict().items()}
    torch.save({"network": unet.state_dict(), "ema": ema}, tmp_path / "checkpoint_00000030.pt")
    (tmp_path / "model.json").write_text('{"iteration": 40, "prediction_type": "flow"}')
    weights.release_weights(str(tmp_path / "checkpoint_00000030.pt"), str(tmp_path / "out.pt"))
    released = torch.load(tmp_path / "out.pt", weights_only=True)
    assert all(torch.equal(released[name], ema[name].bfloat16()) for name in ema)
    assert json.loads((tmp_path / "out.json").read_text()) == {"iteration": 30, "prediction_type": "flow"}
    (tmp_path / "out.json").unlink()
    assert weights.described(str(tmp_path / "out.pt")) == {"iteration": 30, "prediction_type": "flow"}
    weights.load_weights(unet, str(tmp_path / "out.pt"), expected={"prediction_type": "flow"})
    assert next(unet.parameters()).dtype == torch.float32
    torch.save(spoiled(ema, float("nan")), tmp_path / "nan.pt")
    with pytest.raises(BundleError, match="nan.pt' holds NaN"):
        weights.release_weights(str(tmp_path / "nan.pt"), str(tmp_path / "released.pt"))
    assert not (tmp_path / "released.pt").exists()


def test_training_begins_with_the_weights_of_a_file(tmp_path, unet):
    torch.save(unet.state_dict(), tmp_path / "start.pt")
    network, ema = small_unet(), small_unet()
    for parameter in (*network.parameters(), *ema.parameters()):
        parameter.data.zero_()
    begin_with(None, network, ema)
    assert all(not p.any() for p in network.parameters())
    begin_with(str(tmp_path / "start.pt"), network, ema, {"prediction_type": "epsilon"})
    for name, tensor in unet.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor) and torch.equal(ema.state_dict()[name], tensor)
    with pytest.raises(BundleError, match="ckpt_path: there are no weights at"):
        begin_with(str(tmp_path / "none.pt"), network, ema)

import copy
import json
import re
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from conftest import small_unet
from ignite.engine import Engine, Events
from torch import nn

from scripts import checkpoints
from scripts.errors import BundleError
from scripts.sampler import DiffusionSampler


def setup(folder, resume=False, interval=2, iterations=6, network=None):
    """An engine that adds 1 to a single weight each iteration, with the handlers of the bundle."""
    network = network or nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    ema = checkpoints.RampedEMAHandler(network, copy.deepcopy(network).requires_grad_(False), momentum=0.01)
    sampler = SimpleNamespace(iteration=0)

    def step(engine, batch):
        network.weight.data += 1
        optimizer.zero_grad()
        network(torch.ones(1, 1)).sum().backward()
        optimizer.step()

    engine = Engine(step)
    engine.state.device = torch.device("cpu")
    parts = {"network": network, "ema": ema.ema_model, "optimizer": optimizer}
    checkpoints.ResumeHandler(str(folder), parts, sampler, resume).attach(engine)
    ema.attach(engine)
    checkpoints.CheckpointHandler(str(folder), parts, interval, 2, {"schedule": "cosine"}).attach(engine)
    return SimpleNamespace(
        network=network,
        optimizer=optimizer,
        ema=ema,
        sampler=sampler,
        engine=engine,
        run=lambda: engine.run([0] * iterations, max_epochs=1),
    )


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_the_newest_few_are_kept_and_nothing_half_written_is_left(tmp_path):
    setup(tmp_path, iterations=7).run()
    assert names(tmp_path) == ["checkpoint_00000006.pt", "checkpoint_00000007.pt", "model.json", "model.pt"]
    assert json.loads((tmp_path / "model.json").read_text()) == {"iteration": 7, "schedule": "cosine"}


def test_a_resumed_run_has_all_of_the_earlier_ones_state(tmp_path):
    first = setup(tmp_path, iterations=4)
    first.run()
    second = setup(tmp_path, resume=True, iterations=4)
    seen = []
    second.engine.add_event_handler(Events.ITERATION_STARTED, lambda engine: seen.append(engine.state.iteration))
    second.engine.state.max_epochs, second.engine.state.epoch_length = 2, 4
    second.engine.run([0] * 4, max_epochs=2)
    assert seen == [5, 6, 7, 8]
    assert second.sampler.iteration == 4

    whole = setup(tmp_path / "whole", iterations=4)
    whole.engine.run([0] * 4, max_epochs=2)
    assert torch.equal(second.network.weight, whole.network.weight)
    assert torch.equal(second.ema.ema_model.weight, whole.ema.ema_model.weight)
    state = [next(iter(run.optimizer.state.values())) for run in (second, whole)]
    assert all(torch.equal(state[0][key], state[1][key]) for key in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 torn", None])
def test_a_torn_checkpoint_is_passed_over_with_its_name(tmp_path, caplog, damage):
    setup(tmp_path, iterations=4).run()
    newest = tmp_path / "checkpoint_00000004.pt"
    newest.write_bytes(newest.read_bytes()[:-200] if damage is None else damage)
    resumed = setup(tmp_path, resume=True, iterations=4)
    resumed.run()
    assert resumed.sampler.iteration == 2
    assert "checkpoint_00000004.pt" in caplog.text


def test_a_fresh_run_sets_the_earlier_one_aside(tmp_path):
    setup(tmp_path, iterations=4).run()
    before = (tmp_path / "model.pt").read_bytes()
    setup(tmp_path, iterations=2).run()
    assert names(tmp_path) == ["checkpoint_00000002.pt", "model.json", "model.pt", "previous_1"]
    kept = ["checkpoint_00000002.pt", "checkpoint_00000004.pt", "model.json", "model.pt"]
    assert names(tmp_path / "previous_1") == kept
    assert (tmp_path / "previous_1" / "model.pt").read_bytes() == before


def test_a_first_run_sets_weights_aside_that_it_will_replace(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"weights that came with the bundle")
    (tmp_path / "model.json").write_text("{}")
    setup(tmp_path, iterations=2).run()
    assert names(tmp_path / "previous_1") == ["model.json", "model.pt"]
    assert (tmp_path / "previous_1" / "model.pt").read_bytes() == b"weights that came with the bundle"


def test_released_weights_are_the_average_in_half_the_bytes(tmp_path, unet):
    ema = {name: t + 1 for name, t in unet.state_dict().items()}
    torch.save({"network": unet.state_dict(), "ema": ema}, tmp_path / "checkpoint_00000030.pt")
    (tmp_path / "model.json").write_text('{"iteration": 40, "prediction_type": "flow"}')
    checkpoints.release_weights(str(tmp_path / "checkpoint_00000030.pt"), str(tmp_path / "out.pt"))
    released = torch.load(tmp_path / "out.pt", weights_only=True)
    assert all(torch.equal(released[name], ema[name].bfloat16()) for name in ema)
    assert json.loads((tmp_path / "out.json").read_text()) == {"iteration": 30, "prediction_type": "flow"}
    checkpoints.load_weights(unet, str(tmp_path / "out.pt"), prediction_type="flow")
    assert next(unet.parameters()).dtype == torch.float32


def test_training_begins_with_the_weights_of_a_file(tmp_path, unet):
    torch.save(unet.state_dict(), tmp_path / "start.pt")
    network, ema = small_unet(), small_unet()
    for parameter in (*network.parameters(), *ema.parameters()):
        parameter.data.zero_()
    checkpoints.begin_with(None, network, ema, [8, 8, 8])
    assert all(not p.any() for p in network.parameters())
    checkpoints.begin_with(str(tmp_path / "start.pt"), network, ema, [8, 8, 8], prediction_type="epsilon")
    for name, tensor in unet.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor) and torch.equal(ema.state_dict()[name], tensor)
    with pytest.raises(BundleError, match="ckpt_path: there are no weights at"):
        checkpoints.begin_with(str(tmp_path / "none.pt"), network, ema, [8, 8, 8])


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.pt"
    path.write_text("old")

    def disk_full(temporary):
        with open(temporary, "w") as file:
            file.write("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(BundleError, match="model.pt' could not be written.*No space left"):
        checkpoints.write_atomically(str(path), disk_full)
    assert names(tmp_path) == ["model.pt"] and path.read_text() == "old"


def test_the_average_follows_the_weights_first_and_then_lags():
    ema = checkpoints.RampedEMAHandler(nn.Linear(1, 1), nn.Linear(1, 1), momentum=0.01)
    state = SimpleNamespace(iteration=0)
    momenta = []
    for state.iteration in (1, 10, 91, 892, 10_000):
        ema.ramp(SimpleNamespace(state=state), "ema_momentum")
        momenta.append(state.ema_momentum)
    assert momenta == pytest.approx([1, 0.5, 9 / 99, 0.01, 0.01])


def test_the_average_is_the_closed_form(tmp_path):
    run = setup(tmp_path, iterations=5, interval=100)
    weights = []
    run.engine.add_event_handler(Events.ITERATION_COMPLETED, lambda engine: weights.append(run.network.weight.item()))
    run.run()
    expected = 0.0
    for k, weight in enumerate(weights, 1):
        momentum = max(0.01, 9 / (8 + k))
        expected = (1 - momentum) * expected + momentum * weight
    assert run.ema.ema_model.weight.item() == pytest.approx(expected, rel=1e-5)


def test_weights_load_into_the_network(tmp_path, unet):
    wanted = {name: tensor + 1 for name, tensor in unet.state_dict().items()}
    torch.save(wanted, tmp_path / "model.pt")
    checkpoints.load_weights(unet, str(tmp_path / "model.pt"))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in unet.state_dict().items())


def test_missing_weights_say_which_command_makes_them(tmp_path, unet):
    with pytest.raises(BundleError, match="ckpt_path: there are no weights at .*monai.bundle run training"):
        checkpoints.load_weights(unet, str(tmp_path / "model.pt"))


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", "torn"])
def test_a_damaged_file_is_named(tmp_path, unet, content):
    path = tmp_path / "model.pt"
    torch.save(unet.state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000] if content == "torn" else content)
    with pytest.raises(BundleError, match="model.pt' cannot be read as PyTorch weights"):
        checkpoints.load_weights(unet, str(path))


def test_a_pickle_that_would_run_code_is_refused_and_not_run(tmp_path, unet):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"weight": Malicious()}, tmp_path / "model.pt")
    with pytest.raises(BundleError, match="cannot be read"):
        checkpoints.load_weights(unet, str(tmp_path / "model.pt"))
    assert not (tmp_path / "executed").exists()


def test_tensors_of_another_network_are_named(tmp_path, unet):
    state = unet.state_dict()
    state["conv_in.conv.weight"] = torch.zeros(16, 1, 3, 3, 3)
    del state["out.0.weight"]
    state["extra"] = torch.zeros(1)
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(BundleError) as error:
        checkpoints.load_weights(unet, str(tmp_path / "model.pt"))
    for part in (
        "3 tensors differ",
        "conv_in.conv.weight: found (16, 1, 3, 3, 3), the network has (8, 1, 3, 3, 3)",
        "out.0.weight: found nothing",
        "extra: found (1,), the network has nothing",
    ):
        assert part in str(error.value)


def test_other_knobs_than_in_training_are_refused(tmp_path, unet):
    torch.save(unet.state_dict(), tmp_path / "model.pt")
    (tmp_path / "model.json").write_text('{"prediction_type": "epsilon", "iteration": 3}')
    checkpoints.load_weights(unet, str(tmp_path / "model.pt"), prediction_type="epsilon", schedule="cosine")
    with pytest.raises(BundleError, match="prediction_type: 'sample' was given, but .* was trained with 'epsilon'"):
        checkpoints.load_weights(unet, str(tmp_path / "model.pt"), prediction_type="sample")


def as_old_names(state_dict):
    """The names that monai-generative 0.2 gave to the same tensors, with the projection that it never applied."""
    old = {}
    for name, tensor in state_dict.items():
        old[re.sub(r"\.attn\.(to_[qkv])", r".\1", name).replace("postconv", "conv")] = tensor
        if name.endswith(".attn.to_v.weight"):
            old[name.replace(".attn.to_v.weight", ".proj_attn.weight")] = torch.randn_like(tensor)
            old[name.replace(".attn.to_v.weight", ".proj_attn.bias")] = torch.randn(len(tensor))
    return old


@pytest.fixture
def old_style_unet():
    return small_unet(include_fc=False, use_combined_linear=False)


@pytest.mark.parametrize("layout", ["plain", "medforj", "safetensors", "ema", "raw", "monai-generative"])
def test_every_layout_gives_the_same_network(tmp_path, old_style_unet, scheduler, layout):
    wanted = {name: tensor.clone() for name, tensor in old_style_unet.state_dict().items()}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    x, t = torch.randn(1, 1, 8, 8, 8), torch.tensor([3.0])
    before = old_style_unet(x, t)
    path = tmp_path / ("model.safetensors" if layout == "safetensors" else "model.pt")
    if layout == "safetensors":
        safetensors.torch.save_file(wanted, path)
    else:
        content = {
            "plain": wanted,
            "medforj": {"model": wanted},
            "ema": {"network": zeros, "ema": wanted, "iteration": 3},
            "raw": {"network": wanted, "ema": zeros, "iteration": 3},
            "monai-generative": as_old_names(wanted),
        }[layout]
        torch.save(content, path)
    old_style_unet.load_state_dict(zeros)
    sampler = DiffusionSampler(old_style_unet, scheduler, 2)
    checkpoints.load_weights(sampler, str(path), "raw" if layout == "raw" else "ema")
    torch.testing.assert_close(old_style_unet(x, t), before, atol=1e-6, rtol=0)


def test_an_old_network_needs_the_old_attention(tmp_path, unet, old_style_unet):
    torch.save(as_old_names(old_style_unet.state_dict()), tmp_path / "model.pt")
    with pytest.raises(BundleError, match="monai-generative.*include_fc false"):
        checkpoints.load_weights(unet, str(tmp_path / "model.pt"))


def test_an_unknown_kind_of_weights_is_refused(tmp_path, unet):
    torch.save(unet.state_dict(), tmp_path / "model.pt")
    with pytest.raises(BundleError, match="weights: 'averaged' is unknown"):
        checkpoints.load_weights(unet, str(tmp_path / "model.pt"), "averaged")

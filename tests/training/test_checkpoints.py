import copy
import json
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from scripts.training import checkpoints
from scripts.training.optimisation import RampedEMAHandler
from scripts.training.records import TrainingRecords
from scripts.training.resume import ResumeHandler


def setup(folder, resume=False, interval=2, iterations=6, network=None, rate=0.1):
    """An engine that adds 1 to a single weight each iteration, with the handlers of the bundle."""
    network = network or nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    ema = RampedEMAHandler(network, copy.deepcopy(network).requires_grad_(False), momentum=0.01)
    sampler = SimpleNamespace(iteration=0)

    def step(engine, batch):
        network.weight.data += 1
        optimizer.zero_grad()
        network(torch.ones(1, 1)).sum().backward()
        optimizer.step()

    engine = Engine(step)
    engine.state.device = torch.device("cpu")
    parts = {"network": network, "ema": ema.ema_model, "optimizer": optimizer}
    ResumeHandler(str(folder), parts, sampler, resume).attach(engine)
    ema.attach(engine)
    checkpoints.CheckpointHandler(str(folder), parts, interval, 2, {"schedule": "cosine"}, TrainingRecords("")).attach(
        engine
    )
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


@pytest.mark.parametrize("noted", [True, False], ids=["noted", "as in version 0.4"])
@pytest.mark.parametrize(
    "of_checkpoint, given, used, words",
    [
        (0.1, 0.1, 0.1, ""),
        (0.1, 0.3, 0.3, "learning_rate: 0.3 from here on, in place of 0.1"),
        (0.1, 0.05, 0.05, "learning_rate: 0.05 from here on, in place of 0.1"),
        (0.025, 0.1, 0.025, "learning_rate: 0.025 of the checkpoint goes on, to which surges of the loss have lowered"),
        (0.025, 0.03, 0.03, "learning_rate: 0.03 from here on, in place of 0.025"),
    ],
)
def test_a_learning_rate_that_is_given_is_used_and_one_that_a_surge_lowered_goes_on(
    tmp_path, caplog, noted, of_checkpoint, given, used, words
):
    """The run began with 0.1; `test_resume.py` has it in the trainer that ships."""
    setup(tmp_path, iterations=4).run()
    path = tmp_path / "checkpoint_00000004.pt"
    content = torch.load(path, weights_only=True)
    (group,) = content["optimizer"]["param_groups"]
    assert group["initial_lr"] == 0.1
    group["lr"] = of_checkpoint
    if not noted:
        del group["initial_lr"]
    torch.save(content, path)
    for _ in range(2):  # what is used is written into the next checkpoint, and goes on from there
        resumed = setup(tmp_path, resume=True, rate=given)
        resumed.run()
        assert resumed.optimizer.param_groups[0]["lr"] == used
    assert (words in caplog.text) if words else "learning_rate: " not in caplog.text


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 torn", None])
def test_a_torn_checkpoint_is_passed_over_with_its_name(tmp_path, caplog, damage):
    setup(tmp_path, iterations=4).run()
    newest = tmp_path / "checkpoint_00000004.pt"
    newest.write_bytes(newest.read_bytes()[:-200] if damage is None else damage)
    resumed = setup(tmp_path, resume=True, iterations=4)
    resumed.run()
    assert resumed.sampler.iteration == 2
    assert "checkpoint_00000004.pt" in caplog.text


def test_a_checkpoint_with_weights_that_are_not_finite_is_passed_over(tmp_path, caplog):
    setup(tmp_path, iterations=4).run()
    newest = tmp_path / "checkpoint_00000004.pt"
    content = torch.load(newest, weights_only=True)
    content["network"]["weight"][:] = float("nan")
    torch.save(content, newest)
    resumed = setup(tmp_path, resume=True, iterations=4)
    resumed.run()
    assert resumed.sampler.iteration == 2
    assert "checkpoint_00000004.pt' holds NaN or infinite weights in 1 of 1 tensors (weight)" in caplog.text


def test_a_checkpoint_is_loaded_to_any_name_of_the_device(tmp_path):
    setup(tmp_path, iterations=4).run()
    assert checkpoints.newest_whole(str(tmp_path), ("ema",), torch.device("cpu", 0))[0]["iteration"] == 4


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


def test_the_average_follows_the_weights_first_and_then_lags():
    ema = RampedEMAHandler(nn.Linear(1, 1), nn.Linear(1, 1), momentum=0.01)
    state = SimpleNamespace(iteration=0)
    momenta = []
    for state.iteration in (1, 10, 91, 892, 10_000):
        ema.ramp(SimpleNamespace(state=state), "ema_momentum")
        momenta.append(state.ema_momentum)
    assert momenta == pytest.approx([1, 0.5, 9 / 99, 0.01, 0.01])


@pytest.mark.parametrize("accumulation_steps", [1, 2, 4])
def test_the_average_is_the_closed_form_of_the_steps(accumulation_steps):
    network, ema = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False).requires_grad_(False)
    weights, averages = [], []

    def step(engine, batch):
        network.weight.data += (engine.state.iteration % accumulation_steps == 0) * torch.randn(1, 1)

    engine = Engine(step)
    RampedEMAHandler(network, ema, 0.3, accumulation_steps).attach(engine)
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: weights.append(network.weight.item()))
    engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: averages.append(ema.weight.item()))
    engine.run([0] * 12 * accumulation_steps)
    expected = 0.0
    for k, weight in enumerate(weights[accumulation_steps - 1 :: accumulation_steps], 1):
        momentum = max(0.3, 9 / (8 + k))
        expected = (1 - momentum) * expected + momentum * weight
        found = averages[accumulation_steps * k - 1 : accumulation_steps * (k + 1) - 1]
        assert found == pytest.approx([expected] * len(found), rel=1e-4)

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine, Events
from torch import nn

from scripts import checkpoints


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

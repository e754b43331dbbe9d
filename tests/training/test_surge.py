"""Clipped gradients, and the way back from a surge of the loss, injected on purpose."""

import copy
import csv
import json
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY_TRAINING, run_bundle
from ignite.engine import Engine, Events
from matplotlib import image as png
from monai.engines import SupervisedTrainer
from torch import nn
from torch.utils.data import DataLoader

from scripts.running.errors import BundleError
from scripts.running.pictures import triplanar
from scripts.scans.draws import DrawSampler
from scripts.training.checkpoints import CheckpointHandler
from scripts.training.optimisation import GradientNorm, RampedEMAHandler
from scripts.training.previews import PreviewHandler
from scripts.training.progress import TrainingProgress
from scripts.training.records import TrainingRecords
from scripts.training.resume import ResumeHandler
from scripts.training.run import train
from scripts.training.surge import LossSurge, SurgeGuard


class Scalars:
    """Records with a summary writer that remembers."""

    def __init__(self):
        self.values, self.summary_writer = [], self

    def add_scalar(self, name, value, step):
        self.values.append((name, float(value), step))


def closed_form(max_norm):
    """Gradients (3, 0) and (0, 4), of norm 5, after clipping."""
    share = min(1, (max_norm or 5) / 5)
    return [3 * share, 0, 0, 4 * share]


@pytest.mark.parametrize("max_norm", [None, 1.0, 7.0])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.SGD, partial(torch.optim.Adam, fused=True)], ids=["sgd", "fused adam"])
def test_the_true_norm_is_clipped_with_and_without_scaled_gradients(kind, scaled, max_norm):
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
    optimizer, writer = kind(weights, lr=1.0), Scalars()
    GradientNorm(optimizer, max_norm, writer).attach(SimpleNamespace(state=SimpleNamespace(iteration=7)))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
    scaler.scale(3 * weights[0][0] + 4 * weights[1][1]).backward()
    scaler.step(optimizer)
    scaler.update()
    # the gradient that the step used: SGD moves by it, Adam's first moment begins with a tenth of it
    used = [10 * optimizer.state[w]["exp_avg"] if optimizer.state[w].get("step") else -w.detach() for w in weights]
    assert torch.cat(used).tolist() == pytest.approx(closed_form(max_norm), rel=1e-5)
    copies = [nn.Parameter(torch.zeros(2)) for _ in weights]
    for copied, gradient in zip(copies, ([3.0, 0], [0, 4.0])):
        copied.grad = torch.tensor(gradient)
    norm = torch.nn.utils.clip_grad_norm_(copies, max_norm or float("inf"))
    torch.testing.assert_close(torch.cat(used), torch.cat([c.grad for c in copies]))
    assert writer.values == [("gradient_norm", pytest.approx(norm.item()), 7)]


@pytest.mark.parametrize("scaled", [True, False])
def test_a_gradient_that_is_not_finite_is_skipped_by_the_scaler_or_else_warned_of(scaled, caplog):
    weight = nn.Parameter(torch.ones(2))
    optimizer, writer = torch.optim.Adam([weight], lr=1.0, fused=True), Scalars()
    GradientNorm(optimizer, 1.0, writer).attach(SimpleNamespace(state=SimpleNamespace(iteration=5)))
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    for _ in range(2):
        scaler.scale((weight * float("inf")).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    assert writer.values == [] and (weight.tolist() == [1, 1]) == scaled
    assert caplog.text.count("the gradient is not finite at iteration 5") == (not scaled)


class Points(torch.utils.data.Dataset):
    """y = 2 x with a little noise, as (1, 1) items."""

    def __len__(self):
        return 6

    def __getitem__(self, key):
        index, draw = key
        x = torch.tensor([1.0 + index / 6])
        noise = 0.1 * torch.randn(1, generator=torch.Generator().manual_seed(draw))
        return {"image": x, "label": 2 * x + noise, "draw": draw}


def training(folder, spoil=None, resume=False, factor=10, retries=3, iterations=120, interval=20, accumulation_steps=1):
    """A linear network with the handlers of the bundle. `spoil(engine, network)` is called before each iteration."""
    network = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(network.weight)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    ema = copy.deepcopy(network).requires_grad_(False)
    parts = {"network": network, "ema": ema, "optimizer": optimizer}
    folder.mkdir(exist_ok=True)
    records = TrainingRecords(str(folder))
    sampler = DrawSampler(Points(), batch_size=2)
    going_on = ResumeHandler(str(folder), parts, sampler, resume)
    checkpoints = CheckpointHandler(str(folder), parts, interval, 3, {"schedule": "cosine"}, records)
    progress = TrainingProgress(records, iterations, iterations)
    guard = SurgeGuard(records, factor)
    handlers = [going_on, guard, RampedEMAHandler(network, ema, 0.01), progress, checkpoints]
    trainer = SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=-(-iterations // 3),
        train_data_loader=DataLoader(Points(), batch_size=2, sampler=sampler),
        epoch_length=3,
        network=network,
        optimizer=optimizer,
        loss_function=nn.MSELoss(),
        train_handlers=handlers,
        accumulation_steps=accumulation_steps,
    )
    if spoil is not None:
        trainer.add_event_handler(Events.ITERATION_STARTED, spoil, network)
    return SimpleNamespace(run=lambda: train(trainer, handlers, retries), trainer=trainer, **parts)


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def names(folder):
    return sorted(p.name for p in folder.glob("checkpoint_*.pt"))


class Spoil:
    """Adds 1000 to the weight at one iteration, so often as `times` says."""

    def __init__(self, iteration, times=1):
        self.iteration, self.times = iteration, times

    def __call__(self, engine, network):
        if engine.state.iteration == self.iteration and self.times:
            self.times -= 1
            network.weight.data += 1000


def test_a_run_goes_back_and_then_is_the_run_resumed_from_there_with_half_the_rate(tmp_path, caplog):
    run = training(tmp_path / "surged", Spoil(93))  # seen at 103, so that the checkpoint of 100 is one of the surge
    run.run()
    assert "the loss has surged" in caplog.text and "at iteration 103, and the median of the newest 21" in caplog.text
    assert "checkpoint_00000080.pt with learning rate 0.05 (1 of 3 times)" in caplog.text
    assert [int(row["iteration"]) for row in rows(tmp_path / "surged/loss.csv")] == list(range(1, 121))
    given_up = rows(tmp_path / "surged/surges.csv")
    assert [int(row["iteration"]) for row in given_up] == list(range(81, 104))
    assert {(row["surge"], row["learning_rate"]) for row in given_up} == {("1", "0.05")}
    assert (
        max(float(row["loss"]) for row in given_up)
        > 1e5
        > max(float(row["loss"]) for row in rows(tmp_path / "surged/loss.csv"))
    )
    assert names(tmp_path / "surged/surge_1") == ["checkpoint_00000100.pt"]
    assert names(tmp_path / "surged") == [f"checkpoint_{i:08d}.pt" for i in (80, 100, 120)]

    (tmp_path / "resumed").mkdir()
    for name in ("checkpoint_00000080.pt", "loss.csv"):
        shutil.copy(tmp_path / "surged" / name, tmp_path / "resumed")
    resumed = training(tmp_path / "resumed", resume=True)
    resumed.run()
    assert resumed.optimizer.param_groups[0]["lr"] == run.optimizer.param_groups[0]["lr"] == 0.05
    assert rows(tmp_path / "resumed/loss.csv") == rows(tmp_path / "surged/loss.csv")  # every digit, and the epoch
    assert torch.equal(resumed.network.weight, run.network.weight) and torch.equal(resumed.ema.weight, run.ema.weight)
    plain = training(tmp_path / "plain")
    plain.run()
    wanted = rows(tmp_path / "plain/loss.csv")
    assert rows(tmp_path / "surged/loss.csv")[:80] == wanted[:80] and rows(tmp_path / "surged/loss.csv") != wanted


def test_a_surge_that_comes_back_ends_the_run_with_good_weights_on_the_disk(tmp_path):
    with pytest.raises(BundleError, match=r"went back 2 times \(surge_retries\).*--resume true goes on") as stop:
        training(tmp_path, Spoil(93, times=9), retries=2).run()
    assert not isinstance(stop.value, LossSurge) and str(tmp_path / "checkpoint_00000080.pt") in str(stop.value)
    assert names(tmp_path)[-1] == "checkpoint_00000080.pt"
    assert sorted(p.name for p in tmp_path.glob("surge_*")) == ["surge_1", "surge_2", "surge_3"]
    good, model = (torch.load(tmp_path / n, weights_only=True) for n in ("checkpoint_00000080.pt", "model.pt"))
    assert torch.equal(model["weight"], good["ema"]["weight"]) and abs(float(model["weight"]) - 2) < 0.5
    assert json.loads((tmp_path / "model.json").read_text()) == {"iteration": 80, "schedule": "cosine"}
    assert {row["surge"]: float(row["learning_rate"]) for row in rows(tmp_path / "surges.csv")} == {
        "1": 0.05, "2": 0.025, "3": 0.0125,
    }  # fmt: skip
    later = training(tmp_path, resume=True)
    later.run()
    assert later.optimizer.param_groups[0]["lr"] == 0.0125
    assert len(rows(tmp_path / "loss.csv")) == 120 and len(rows(tmp_path / "surges.csv")) == 3 * 23


def test_a_surge_before_the_first_checkpoint_stops_and_a_resume_does_not_take_what_it_wrote(tmp_path, caplog):
    with pytest.raises(BundleError, match="surged.*there is no checkpoint from before it.*learning_rate"):
        training(tmp_path, Spoil(55), interval=60).run()
    assert names(tmp_path) == [] and names(tmp_path / "surge_1") == ["checkpoint_00000060.pt"]


def test_a_torn_checkpoint_is_passed_over_on_the_way_back(tmp_path, caplog):
    def spoil(engine, network):
        if engine.state.iteration == 93 and not (tmp_path / "surges.csv").read_text().count("\n") > 1:
            (tmp_path / "checkpoint_00000060.pt").write_bytes(b"torn")
            network.weight.data += float("inf")

    training(tmp_path, spoil, interval=30).run()
    assert "the loss is inf at iteration 93" in caplog.text or "the loss is nan at iteration 93" in caplog.text
    assert "passed over" in caplog.text and "checkpoint_00000030.pt with learning rate 0.05" in caplog.text
    assert len(rows(tmp_path / "loss.csv")) == 120


def test_accumulated_gradients_are_clipped_as_one(tmp_path):
    run, writer = training(tmp_path, accumulation_steps=3, iterations=3, interval=3), Scalars()
    gradients = []
    GradientNorm(run.optimizer, 0.5, writer).attach(run.trainer)
    run.optimizer.register_step_pre_hook(lambda *_: gradients.append(run.network.weight.grad.item()))
    run.run()
    items = [Points()[int(index), draw] for index, draw in zip(np.random.default_rng([0, 0]).permutation(6), range(6))]
    x, y = (torch.stack([item[key] for item in items]) for key in ("image", "label"))
    whole = float((2 * x * (0 * x - y)).mean())  # d/dw of the mean of (w x - y)^2 at w = 0
    assert gradients == [pytest.approx(-0.5, rel=1e-5)]
    assert writer.values == [("gradient_norm", pytest.approx(abs(whole), rel=1e-5), 3)]


NO_RECORDS = SimpleNamespace(losses=None, surges=None)


def seen_at(losses, factor=10):
    """The index at which a guard sees a surge in a series of losses, or None."""
    guard = SurgeGuard(NO_RECORDS, factor)
    for i, loss in enumerate(losses):
        state = SimpleNamespace(
            output={"loss": torch.tensor(float(loss))}, iteration=i, epoch=1, batch={"draw": torch.tensor([4, 5])}
        )
        try:
            guard(SimpleNamespace(state=state))
        except LossSurge:
            return i
    return None


def test_what_is_a_surge_and_what_is_not():
    random = np.random.default_rng(0)
    steady = 0.05 * random.lognormal(0, 0.5, 2000)  # a factor of 5 between the lowest and the highest tenth
    assert seen_at(steady) is None
    assert seen_at(np.linspace(0.01, 1, 500) ** -1.5) is None  # the steep beginning of a training
    spikes = steady.copy()
    spikes[np.arange(100, 1900, 100)] = 5959
    spikes[1000:1010] = 5959  # even ten in a row, not half of the newest 21
    assert seen_at(spikes) is None
    surge = steady.copy()
    surge[700:] *= 40
    assert seen_at(surge) == 710
    assert seen_at(surge, factor=None) is None
    assert seen_at(surge[:20]) is None and seen_at([1] * 30 + [100] * 60) is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_says_where(value):
    guard = SurgeGuard(NO_RECORDS, None)
    state = SimpleNamespace(
        output={"loss": torch.tensor(value)}, iteration=12, epoch=3, batch={"draw": torch.tensor([44, 45])}
    )
    with pytest.raises(BundleError, match=rf"loss is {value} at iteration 12 \(epoch 3, draws \[44, 45\]\)") as stop:
        guard(SimpleNamespace(state=state))
    with pytest.raises(BundleError, match="checkpoints from before it are kept.*--resume true goes on"):
        guard.go_back(stop.value, None, 1, 3)
    state.output["loss"] = torch.tensor(0.1)
    guard(SimpleNamespace(state=state))


def test_the_real_command_recovers_from_an_injected_surge_and_draws_it(cohort, tmp_path):
    """One step, that of iteration 45 when it is first made, has 1024 times the learning rate: see docs/training.md."""
    overlay = {
        "rate": "${44: 1024, 45: 1 / 1024}",
        "disturb": "$lambda engine: [g.update(lr=g['lr'] * f) for f in [@rate.pop(engine.state.iteration, 1)] "
        "for g in @optimizer.param_groups]",
        "+initialize": ["$@train#trainer.add_event_handler(monai.engines.IterationEvents.MODEL_COMPLETED, @disturb)"],
    }
    (tmp_path / "surge.json").write_text(json.dumps(overlay))
    out = tmp_path / "out"
    knobs = TINY_TRAINING | {"max_iterations": 64, "checkpoint_interval": 16, "val_interval": 32, "preview_steps": 2}
    knobs |= {"preview_interval": 64, "preview_epochs": "[0,8,15]", "max_grad_norm": 1, "surge_retries": 1}
    knobs |= {"dataset_dir": cohort, "output_dir": out, "ckpt_dir": out / "models"}
    config = f"['configs/train.json','configs/presets/demo.json','{tmp_path}/surge.json']"
    done = run_bundle("run", "training", config_file=config, **knobs)
    assert done.returncode == 0, done.stderr
    (said,) = (line for line in done.stdout.splitlines() if "the loss has surged" in line)
    assert "at iteration 56, and the median of the newest 21" in said
    assert "checkpoint_00000032.pt with learning rate 0.0005 (1 of 1 times)" in done.stdout
    assert "terminating" not in done.stdout + done.stderr
    assert [int(row["iteration"]) for row in rows(out / "loss.csv")] == list(range(1, 65))
    assert [int(row["iteration"]) for row in rows(out / "surges.csv")] == list(range(33, 57))
    assert [(row["iteration"], row["weights"]) for row in rows(out / "validation.csv")] == [
        (i, weights) for i in ("32", "64") for weights in ("raw", "ema")
    ]
    assert names(out / "models/surge_1") == ["checkpoint_00000048.pt"]
    newest = torch.load(out / "models/checkpoint_00000064.pt", weights_only=True)
    assert newest["optimizer"]["param_groups"][0]["lr"] == 0.0005
    assert json.loads((out / "models/model.json").read_text())["iteration"] == 64
    assert sorted(p.name for p in (out / "previews").glob("epoch_*")) == [f"epoch_{i:05d}.png" for i in (0, 8, 15)]
    for name in ("loss_curve.png", "epochs.png"):
        red = png.imread(out / name)[..., :3] - np.array([0.839, 0.153, 0.157])  # tab:red
        assert (np.abs(red).max(-1) < 0.02).sum() > 100, name
    assert list(out.glob("tensorboard/*"))


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 8)], ids=["2d", "3d"])
def test_samples_of_chosen_epochs_are_columns_above_the_loss_and_survive_a_resume(tmp_path, shape):
    """The samples are the noise times a weight that grows by 0.1 an iteration; an epoch is 3 iterations."""
    records = TrainingRecords(str(tmp_path))
    weight = [0.0]

    def sampler(noise):
        return noise * weight[0]

    def step(engine, batch):
        weight[0] += 0.1
        records.losses.add(engine.state.iteration, engine.state.epoch, 1 / engine.state.iteration)

    def run(start, end):
        weight[0] = 0.1 * start
        engine = Engine(step)
        engine.state.device = torch.device("cpu")
        engine.add_event_handler(Events.STARTED, lambda: records.losses.start(start))
        PreviewHandler(sampler, shape, 100, records, 2, epochs=[4, 0, 2, 9]).attach(engine)
        engine.load_state_dict({"iteration": start, "max_epochs": end // 3, "epoch_length": 3})
        engine.run([0] * 3)

    def columns():
        return sorted(p.name for p in (tmp_path / "previews").glob("epoch_*"))

    run(0, 9)
    assert columns() == ["epoch_00000.png", "epoch_00002.png"] and (tmp_path / "epochs.png").exists()
    run(9, 15)
    assert columns() == ["epoch_00000.png", "epoch_00002.png", "epoch_00004.png"]
    for epoch in (0, 2, 4):
        noises = torch.randn(2, 1, 1, *shape, generator=torch.Generator().manual_seed(0))
        wanted = np.concatenate([triplanar(0.3 * epoch * noise[0, 0].numpy()) for noise in noises])
        found = png.imread(tmp_path / f"previews/epoch_{epoch:05d}.png")[..., 0]
        np.testing.assert_allclose(found, np.clip((wanted + 1) / 2, 0, 1), atol=0.01)
    picture = png.imread(tmp_path / "epochs.png")[..., :3].mean(-1)
    assert picture.shape[1] >= 800 and picture.std() > 0.1

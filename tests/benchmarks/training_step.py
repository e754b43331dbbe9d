"""Time one training step: the plain MONAI way, the same with amp, the authors' own code, and this bundle.

    python tests/benchmarks/training_step.py --side 32 --batch 4 --med_ddpm CLONE --profile --output step.json
    python tests/benchmarks/training_step.py --side 64 --also wavelet_levels=1 --wdm CLONE
    python tests/benchmarks/training_step.py --side 128 --batch 4 --preset configs/presets/paper_128.json \\
        --set activation_checkpointing=all --also "compile=true" --also "keep_freed_memory=false"

"MONAI float32" is `SupervisedTrainer` with `DiffusionPrepareBatch`, `DiffusionInferer` and `torch.optim.Adam` as they
are; "MONAI amp" autocasts (float16 and a scaled loss on CUDA, bfloat16 on a CPU, where MONAI's engine has no amp).
"med-ddpm" is the network, loss and optimiser of github.com/mobaidoctor/med-ddpm (a clone; nothing of it is here), with
the same channels and attention. These three read their volumes from memory and do no more than the step. "ours" is the
trainer of configs/train.json with all that it does at every step: loading, random transforms, EMA, records. Validation,
previews and checkpoints come at intervals and are left out.

"ours: wavelet_levels=1" is another network, grown from the same weights, and so are those of the clones. All others
have the same weights; before any time is taken, each one's output for the same input is compared with float32
(relative norm), and the script fails at 2%. The gradient's error is printed as well.
"""

from __future__ import annotations

import shlex
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from common import (
    AMP,
    AUTHORS,
    OURS,
    PLAIN,
    WDM,
    Turns,
    Worker,
    another_network,
    file_name,
    fill_zeros,
    hardware,
    limit_table,
    load_common,
    med_ddpm,
    options,
    profile_table,
    read_config,
    relative_error,
    spread,
    table,
    take_turns,
    wdm,
    write,
)
from ignite.engine import Events
from monai.engines import DiffusionPrepareBatch, SupervisedTrainer
from monai.inferers import DiffusionInferer
from monai.networks.schedulers import DDPMScheduler
from monai.transforms import Compose
from torch.utils.data import DataLoader

from scripts.diffusion.wavelets import analysed, synthesised
from scripts.scans.phantoms import phantom_cohort

TOLERANCE = 0.02
NEVER = 10**9
VOLUMES = 16


class AutocastInferer(DiffusionInferer):
    """What a user of MONAI writes to have bfloat16 on a CPU."""

    def __call__(self, inputs: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().__call__(inputs, *args, **kwargs)


def check(turns: Turns, arguments, network: torch.nn.Module, predict) -> None:
    """Answer that this variant is ready; its output and gradient for the common batch lie in the folder."""
    batch = torch.load(Path(arguments.folder) / "batch.pt")
    volumes, noise, timesteps = (batch[key].to(arguments.device) for key in ("volumes", "noise", "timesteps"))
    network.train()
    output = predict(volumes, noise, timesteps)
    (output.float() - noise).abs().mean().backward()
    gradient = torch.cat([p.grad.flatten().float() for p in network.parameters() if p.grad is not None])
    network.zero_grad(set_to_none=True)
    path = str(Path(arguments.folder) / f"{file_name(arguments.variant)}.pt")
    torch.save({"output": output.detach().float().cpu(), "gradient": gradient.cpu()}, path)
    turns.answer(check=path, parameters=sum(p.numel() for p in network.parameters()))


def run_engine(turns: Turns, trainer: SupervisedTrainer) -> None:
    """Run a trainer that stops after each turn until the next one is asked for; the first two steps warm up."""
    left = {"now": 2, "all": 0}

    def completed(engine) -> None:
        left["now"] -= 1
        if left["now"] == 0:
            if left["all"]:
                turns.end(left["all"])
            left["all"] = left["now"] = turns.begin()["times"]

    trainer.add_event_handler(Events.ITERATION_COMPLETED, completed)
    trainer.run()


def monais(turns: Turns, arguments) -> None:
    """(a) and (b): `SupervisedTrainer` as anyone would use it."""
    config = read_config("train.json", arguments)
    network = config.get_parsed_content("network_def").to(arguments.device)
    network.load_state_dict(torch.load(Path(arguments.folder) / "weights.pt"))
    scheduler = DDPMScheduler(num_train_timesteps=config["num_train_timesteps"], schedule=config["schedule"])
    amp, cuda = arguments.variant == AMP, arguments.device.startswith("cuda")
    inferer = (AutocastInferer if amp and not cuda else DiffusionInferer)(scheduler)

    def predict(volumes: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", enabled=amp and cuda):
            return inferer(volumes, network, noise=noise, timesteps=timesteps)

    check(turns, arguments, network, predict)
    volumes = torch.load(Path(arguments.folder) / "volumes.pt")
    loader = DataLoader([{"image": v, "label": v} for v in volumes], arguments.batch, shuffle=True, drop_last=True)
    trainer = SupervisedTrainer(
        device=torch.device(arguments.device),
        max_epochs=NEVER,
        train_data_loader=loader,
        network=network,
        optimizer=torch.optim.Adam(network.parameters(), 1e-4),
        loss_function=torch.nn.L1Loss(),
        inferer=inferer,
        prepare_batch=DiffusionPrepareBatch(scheduler.num_train_timesteps),
        amp=amp and cuda,
    )
    run_engine(turns, trainer)


def authors(turns: Turns, arguments) -> None:
    """(c): one micro-batch of their `Trainer.train` and its optimiser step, without its files and its EMA."""
    config = read_config("train.json", arguments)
    diffusion = med_ddpm(arguments.med_ddpm, config, arguments.side, config["num_train_timesteps"])
    diffusion = diffusion.to(arguments.device)

    def predict(volumes: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return diffusion.denoise_fn(diffusion.q_sample(volumes, timesteps, noise), timesteps)

    check(turns, arguments, diffusion, predict)
    volumes = torch.load(Path(arguments.folder) / "volumes.pt")
    loader = DataLoader(volumes, arguments.batch, shuffle=True, drop_last=True)
    optimizer = torch.optim.Adam(diffusion.parameters(), 1e-4)

    def batches():
        while True:
            yield from loader

    stream = batches()

    def step() -> None:
        loss = diffusion(next(stream).to(arguments.device)).sum() / arguments.batch
        loss.backward()
        loss.item()
        optimizer.step()
        optimizer.zero_grad()

    step(), step()
    turns.serve({"step": step})


def wdms(turns: Turns, arguments) -> None:
    """Their U-Net and an optimiser step on the bands of one level, without their transform and their files."""
    network = wdm(arguments.wdm, read_config("train.json", arguments))
    network.to(arguments.device)  # theirs returns nothing

    def predict(volumes: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        return synthesised(network(analysed(noise, 1), timesteps), 1)

    check(turns, arguments, network, predict)
    volumes = torch.load(Path(arguments.folder) / "volumes.pt")
    bands = analysed(volumes[: arguments.batch], 1).to(arguments.device)
    timesteps = torch.arange(arguments.batch, device=arguments.device)
    optimizer = torch.optim.Adam(network.parameters(), 1e-4)

    def step() -> None:
        optimizer.zero_grad()
        (network(bands, timesteps) - bands).square().mean().backward()
        optimizer.step()

    step(), step()
    turns.serve({"step": step})


def ours(turns: Turns, arguments) -> None:
    """(d): the trainer that configs/train.json makes, with `--set` and what an `--also` adds."""
    settings = [*arguments.set, *shlex.split(arguments.variant.removeprefix(OURS).lstrip(": "))]
    config = read_config("train.json", arguments, settings)
    folder = Path(arguments.folder)
    places = {"dataset_dir": "cohort", "output_dir": f"output_{file_name(arguments.variant)}"}
    for key, name in (places | {"ckpt_dir": places["output_dir"] + "/models"}).items():
        config[key] = str(folder / name)
    for key in ("val_interval", "preview_interval", "checkpoint_interval", "max_iterations"):
        config[key] = NEVER
    config.get_parsed_content("initialize")
    network = config.get_parsed_content("network")
    load_common(network, folder)
    inferer = config.get_parsed_content("train#inferer")
    check(
        turns,
        arguments,
        network,
        lambda volumes, noise, timesteps: inferer(volumes, network, noise=noise, timesteps=timesteps),
    )
    run_engine(turns, config.get_parsed_content("train#trainer"))


def prepare(arguments, folder: str) -> None:
    """Phantoms as files and as tensors, common weights, and one batch to compare outputs with."""
    config = read_config("train.json", arguments)
    cohort = phantom_cohort(f"{folder}/cohort", max(VOLUMES, 2 * arguments.batch), [arguments.side] * 3)
    transform = Compose(config.get_parsed_content("deterministic_transforms"))
    volumes = [transform({"image": str(path)})["image"].float() for path in sorted(Path(cohort).glob("*.nii.gz"))]
    torch.save(torch.stack(volumes), f"{folder}/volumes.pt")
    torch.manual_seed(0)
    torch.save(fill_zeros(config.get_parsed_content("network_def")).state_dict(), f"{folder}/weights.pt")
    batch = torch.stack(volumes[: arguments.batch])
    timesteps = torch.linspace(0, config["num_train_timesteps"] - 1, arguments.batch + 2)[1:-1].long()
    torch.save({"volumes": batch, "noise": torch.randn_like(batch), "timesteps": timesteps}, f"{folder}/batch.pt")


def main() -> None:
    parser = options(__doc__.splitlines()[0], side=32, batch=4)
    parser.add_argument("--steps", type=int, help="steps of a turn; default 2 on a CPU, 20 on a GPU")
    parser.add_argument("--med_ddpm", help="clone of github.com/mobaidoctor/med-ddpm, to time it as well")
    parser.add_argument("--wdm", help="clone of github.com/pfriedri/wdm-3d, to time its U-Net on bands of one level")
    parser.add_argument("--also", action="append", default=[], help='ours once more, with "KEY=VALUE KEY=VALUE"')
    parser.add_argument("--profile", action="store_true", help="print where the time goes, by kind of kernel")
    arguments = parser.parse_args()
    if arguments.variant:
        turns = Turns(arguments.device)
        {PLAIN: monais, AMP: monais, AUTHORS: authors, WDM: wdms}.get(arguments.variant, ours)(turns, arguments)
        return

    steps = arguments.steps or (20 if arguments.device.startswith("cuda") else 2)
    variants = [PLAIN, AMP, *([AUTHORS] if arguments.med_ddpm else []), *([WDM] if arguments.wdm else []), OURS]
    variants += [f"{OURS}: {settings}" for settings in arguments.also]
    result = {"hardware": hardware(arguments.device), "arguments": vars(arguments), "variants": {}}
    print(f"{result['hardware']}\nside {arguments.side}, batch {arguments.batch}, {steps} steps a turn", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        prepare(arguments, folder)
        workers = [Worker(variant, folder) for variant in variants]
        wanted = torch.load(workers[0].first["check"])
        for worker in workers:
            row = result["variants"][worker.variant] = {"parameters": worker.first["parameters"]}
            if not another_network(worker.variant):
                found = torch.load(worker.first["check"])
                row["output_error"] = relative_error(found["output"], wanted["output"])
                row["gradient_error"] = relative_error(found["gradient"], wanted["gradient"])
                if not row["output_error"] < TOLERANCE:
                    sys.exit(f"{worker.variant}: the output differs by {row['output_error']:.2%}; times mean nothing")
        seconds = take_turns(workers, arguments.rounds, "step", steps)
        profiled = [w for w in workers if w.variant in (PLAIN, OURS)] if arguments.profile else []
        result["profile"] = {worker.variant: worker.turn("step", steps, True)["profile"] for worker in profiled}
        for worker in workers:
            last = worker.turn("step", 1)
            result["variants"][worker.variant] |= {"seconds": seconds[worker.variant], "peak_bytes": last["memory"]}
            worker.stop()

    base = statistics.median(seconds[PLAIN])
    rows = []
    for variant, row in result["variants"].items():
        row["median"] = statistics.median(row["seconds"])
        row["ratio"] = base / row["median"]
        errors = [f"{row[key]:.2%}" if key in row else "" for key in ("output_error", "gradient_error")]
        peak = f"{row['peak_bytes'] / 2**30:.2f}"
        rows.append([variant, f"{row['parameters']:,}", *errors, spread(row["seconds"]), f"{row['ratio']:.2f}", peak])
    header = ["variant", "parameters", "output error", "gradient error", "seconds a step", "times (a)", "peak GiB"]
    print("\n" + table(header, rows))
    if result["profile"]:
        print("\n" + profile_table(result["profile"]))
        network = read_config("train.json", arguments).get_parsed_content("network_def")
        lines, result["limit"] = limit_table(network, arguments, True, result["profile"])
        print("\n" + lines)
    write(arguments.output, result)


if __name__ == "__main__":
    main()

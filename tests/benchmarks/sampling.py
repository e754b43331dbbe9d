"""Time sampling, one network pass and a whole volume: plain MONAI, with amp, the authors' loop, and this bundle.

    python tests/benchmarks/sampling.py --side 64 --med_ddpm CLONE --profile --output sampling.json
    python tests/benchmarks/sampling.py --side 128 --preset configs/presets/paper_128.json --whole --also "compile=true"

"MONAI float32" is `DiffusionInferer.sample` with `DDPMScheduler`; "MONAI amp" is the same under autocast; "med-ddpm" is
`p_sample_loop` of github.com/mobaidoctor/med-ddpm (a clone; nothing of it is here) with the same channels. "ours" is
the sampler of configs/inference.json with the "ddpm" solver, at equal steps; "ours, default solver" takes the solver
and the number of steps that the config has. Every step is one pass of the network, so a whole volume is computed from
--steps timed ones, unless --whole.

All have the same weights: random ones, or --weights. Before any time is taken, each network's output is compared with
float32 (relative norm), and the script fails at 2%. Volumes of --check_side are sampled in full by each loop from the
same first noise and their statistics printed; ours also in float32, whose noise on the way is the same.
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
    Turns,
    Worker,
    another_network,
    drop,
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
    write,
)
from monai.inferers import DiffusionInferer
from monai.networks.schedulers import DDPMScheduler

from scripts.diffusion.weights import load_weights

TOLERANCE = 0.02
DEFAULT = "ours, default solver"


def noise_of(side: int, arguments) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(arguments.batch, 1, *[side] * 3, generator=generator).to(arguments.device)


def timesteps_of(arguments, total: int) -> torch.Tensor:
    """For the comparison of networks: one in the middle, for every volume of a batch."""
    return torch.full((arguments.batch,), total // 2, device=arguments.device)


def serve(turns: Turns, arguments, predict, sample, total: int, most: int) -> None:
    """Check, warm up, and do what the parent asks for.

    Args:
        predict: (x, timesteps) -> the network's output.
        sample: (noise, number of steps) -> volumes.
        total: number of training timesteps.
        most: number of steps of a whole volume.
    """
    noise, timesteps = noise_of(arguments.side, arguments), timesteps_of(arguments, total)
    with torch.no_grad():
        output = predict(noise, timesteps).float().cpu()
    volumes = sample(noise_of(arguments.check_side, arguments), most).float().cpu() if arguments.check_side else None
    path = str(Path(arguments.folder) / f"{file_name(arguments.variant)}.pt")
    torch.save({"output": output, "volumes": volumes}, path)
    turns.answer(check=path, whole=most)

    @torch.no_grad()
    def one_pass() -> None:
        predict(noise, timesteps)

    steps = most if arguments.whole else min(arguments.steps, most)
    one_pass()
    turns.serve({"pass": one_pass, "steps": lambda: sample(noise, steps), "one": lambda: sample(noise, 1)})


def monais(turns: Turns, arguments) -> None:
    """(a) and (b)"""
    config = read_config("inference.json", arguments)
    total = config["num_train_timesteps"]
    network = config.get_parsed_content("network_def#unet#unet").to(arguments.device).eval()
    network.load_state_dict(torch.load(Path(arguments.folder) / "weights.pt"))
    scheduler = DDPMScheduler(num_train_timesteps=total, schedule=config["schedule"])
    inferer = DiffusionInferer(scheduler)
    kind = arguments.device.split(":")[0]
    autocast = {"device_type": kind, "enabled": arguments.variant == AMP}  # float16 on CUDA, bfloat16 on a CPU

    def predict(x: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
        with torch.autocast(**autocast):
            return network(x, timesteps)

    def sample(noise: torch.Tensor, steps: int) -> torch.Tensor:
        scheduler.set_timesteps(steps)
        with torch.autocast(**autocast):
            return inferer.sample(noise, network, scheduler, verbose=False)

    serve(turns, arguments, predict, sample, total, total)


def authors(turns: Turns, arguments) -> None:
    """(c)"""
    config = read_config("inference.json", arguments)
    total = config["num_train_timesteps"]
    diffusion = med_ddpm(arguments.med_ddpm, config, arguments.side, total).to(arguments.device).eval()

    def sample(noise: torch.Tensor, steps: int) -> torch.Tensor:
        diffusion.num_timesteps = steps
        return diffusion.p_sample_loop(noise.shape)

    serve(turns, arguments, diffusion.denoise_fn, sample, total, total)


def ours(turns: Turns, arguments) -> None:
    """(d) and (e), with `--set` and what an `--also` adds."""
    default = arguments.variant == DEFAULT
    words = "" if default else arguments.variant.removeprefix(OURS).lstrip(": ")
    settings = [*arguments.set, *shlex.split(words)]

    def sampler_of(steps: int | None):
        config = read_config("inference.json", arguments, settings)
        drop(config, "load_weights")
        config["network_def#progress"] = False
        if not default:
            config["solver"], config["timestep_spacing"], config["sigma_max"] = "ddpm", "linspace", None
        if steps:
            config["num_inference_steps"] = steps
        config.get_parsed_content("initialize")
        sampler = config.get_parsed_content("network").eval()
        load_common(sampler, arguments.folder)
        return sampler

    total = read_config("inference.json", arguments)["num_train_timesteps"]
    whole = sampler_of(None if default else total)
    most = len(whole.timesteps)
    samplers = {most: whole}

    def sample(noise: torch.Tensor, steps: int) -> torch.Tensor:
        if steps not in samplers:  # another table of coefficients, the same network
            samplers[steps] = sampler_of(steps)
            samplers[steps].unet = whole.unet
        return samplers[steps](noise)

    if arguments.check_side:
        dtype, whole.amp_dtype = whole.amp_dtype, None
        exact = whole(noise_of(arguments.check_side, arguments)).cpu()
        torch.save(exact, Path(arguments.folder) / f"{file_name(arguments.variant)}_float32.pt")
        whole.amp_dtype = dtype
    for steps in {1, min(arguments.steps, most)}:
        sample(noise_of(16, arguments), steps)
    serve(turns, arguments, lambda x, t: whole.predict(x, t, whole.asked_of(x, None)), sample, total, most)


def prepare(arguments, folder: str) -> None:
    """The weights that all but the authors' network have."""
    config = read_config("inference.json", arguments)
    torch.manual_seed(0)
    network = config.get_parsed_content("network_def#unet#unet")
    if arguments.weights:
        load_weights(network, arguments.weights)
    torch.save(fill_zeros(network).state_dict(), f"{folder}/weights.pt")


def describe(volumes: torch.Tensor) -> dict[str, float]:
    """Statistics of sampled volumes: of the voxels, and the mean step from voxel to voxel along the first axis."""
    low, middle, high = torch.quantile(volumes.flatten()[: 2**24], torch.tensor([0.05, 0.5, 0.95])).tolist()
    return {
        "mean": volumes.mean().item(),
        "std": volumes.std().item(),
        "5%": low,
        "50%": middle,
        "95%": high,
        "gradient": volumes.diff(dim=2).abs().mean().item(),
    }


def check(workers: list[Worker], folder: str, result: dict) -> None:
    """Compare networks and sampled volumes before any time is taken."""
    wanted = torch.load(workers[0].first["check"])
    rows = []
    for worker in workers:
        found = torch.load(worker.first["check"])
        row = result["variants"][worker.variant] = {"steps_of_a_volume": worker.first["whole"]}
        if not another_network(worker.variant):
            row["output_error"] = relative_error(found["output"], wanted["output"])
            if not row["output_error"] < TOLERANCE:
                sys.exit(f"{worker.variant}: the output differs by {row['output_error']:.2%}; times mean nothing")
        if found["volumes"] is not None:
            row["statistics"] = describe(found["volumes"])
            rows.append([worker.variant, *(f"{value:.4f}" for value in row["statistics"].values()), ""])
            exact = Path(folder) / f"{file_name(worker.variant)}_float32.pt"
            if exact.exists():
                row["volume_error"] = relative_error(found["volumes"], torch.load(exact))
                rows[-1][-1] = f"{row['volume_error']:.2%}"
                row["statistics_float32"] = describe(torch.load(exact))
                rows.append(
                    [f"{worker.variant}, in float32", *(f"{v:.4f}" for v in row["statistics_float32"].values())]
                )
                rows[-1].append("")
    if rows:
        header = ["sampled volumes", *result["variants"][OURS]["statistics"], "difference from its own float32"]
        print("\n" + table(header, rows) + "\n", flush=True)


def main() -> None:
    parser = options(__doc__.splitlines()[0], side=64, batch=1)
    parser.add_argument("--steps", type=int, default=5, help="steps of the reverse diffusion in a turn")
    parser.add_argument("--whole", action="store_true", help="time whole volumes")
    parser.add_argument("--weights", help="a checkpoint, instead of random weights")
    parser.add_argument("--check_side", type=int, default=16, help="side of the compared volumes; 0 for none")
    parser.add_argument("--med_ddpm", help="clone of github.com/mobaidoctor/med-ddpm, to time it as well")
    parser.add_argument("--also", action="append", default=[], help='ours once more, with "KEY=VALUE KEY=VALUE"')
    parser.add_argument("--profile", action="store_true", help="print where the time goes, by kind of kernel")
    arguments = parser.parse_args()
    if arguments.variant:
        turns = Turns(arguments.device)
        {PLAIN: monais, AMP: monais, AUTHORS: authors}.get(arguments.variant, ours)(turns, arguments)
        return

    variants = [PLAIN, AMP, *([AUTHORS] if arguments.med_ddpm else []), OURS, DEFAULT]
    variants += [f"{OURS}: {settings}" for settings in arguments.also]
    result = {"hardware": hardware(arguments.device), "arguments": vars(arguments), "variants": {}}
    print(f"{result['hardware']}\nside {arguments.side}, batch {arguments.batch}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        prepare(arguments, folder)
        workers = [Worker(variant, folder) for variant in variants]
        check(workers, folder, result)
        passes = take_turns(workers, arguments.rounds, "pass", 1)
        seconds = take_turns(workers, arguments.rounds, "steps", 1)
        profiled = [w for w in workers if w.variant in (PLAIN, OURS)] if arguments.profile else []
        result["profile"] = {worker.variant: worker.turn("one", 1, True)["profile"] for worker in profiled}
        for worker in workers:
            row, most = result["variants"][worker.variant], worker.first["whole"]
            steps = most if arguments.whole else min(arguments.steps, most)
            last = worker.turn("one", 1)
            row |= {"seconds_of_a_pass": passes[worker.variant], "peak_bytes": last["memory"]}
            row["seconds_of_a_volume"] = [s / steps * most for s in seconds[worker.variant]]
            row["timed_steps"] = steps
            worker.stop()

    rows = []
    for variant, row in result["variants"].items():
        cells = []
        for key in ("seconds_of_a_pass", "seconds_of_a_volume"):
            row[f"median_{key}"] = statistics.median(row[key])
            base = result["variants"][PLAIN][f"median_{key}"]
            row[f"ratio_{key}"] = base / row[f"median_{key}"]
            cells += [spread(row[key]), f"{row[f'ratio_{key}']:.2f}"]
        error = f"{row['output_error']:.2%}" if "output_error" in row else ""
        rows.append(
            [variant, error, *cells[:2], row["steps_of_a_volume"], *cells[2:], f"{row['peak_bytes'] / 2**30:.2f}"]
        )
    volume = "seconds a volume" + ("" if arguments.whole else f" (from {arguments.steps} steps)")
    header = ["variant", "output error", "seconds a pass", "times (a)", "steps", volume, "times (a)", "peak GiB"]
    print("\n" + table(header, rows))
    if result["profile"]:
        print("\nOne step:\n\n" + profile_table(result["profile"]))
        network = read_config("inference.json", arguments).get_parsed_content("network_def#unet#unet")
        lines, result["limit"] = limit_table(network, arguments, False, result["profile"])
        print("\n" + lines)
    write(arguments.output, result)


if __name__ == "__main__":
    main()

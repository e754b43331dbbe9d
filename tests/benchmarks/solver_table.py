"""Print the exact result of every solver on Gaussian data as a Markdown table (docs/solvers.md).

    python tests/benchmarks/solver_table.py

Data are N(0.3, 0.2^2) per voxel, with the ideal network; the ideal standard deviation is 0.2000. Our rows follow from
the exact recursion of tests/gaussian.py; MONAI's schedulers are sampled as they are (a volume of 64^3, seed 0).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import torch  # noqa: E402
from gaussian import IdealNetwork, exact_moments  # noqa: E402
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler  # noqa: E402

from scripts.diffusion.process import levels_at, training_timesteps  # noqa: E402
from scripts.diffusion.solvers import SOLVERS, gaussian_weight, visited  # noqa: E402

STEPS = (10, 15, 25, 50, 250)


def ours(scheduler: DDPMScheduler, solver: str, spacing: str, sigma_max: float | None, steps: int) -> str:
    a, s = (level.numpy() for level in levels_at(scheduler, training_timesteps(scheduler)))
    chosen = visited(a, s, steps, spacing, sigma_max)
    weight = gaussian_weight if solver == "gaussian_2m" else None
    return "{1:.4f}".format(*exact_moments(a[chosen], s[chosen], solver, weight))


def monais(scheduler: DDPMScheduler | DDIMScheduler, steps: int) -> str:
    scheduler.set_timesteps(steps)
    network = IdealNetwork(scheduler)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, 64, 64, 64, generator=generator)
    for t in scheduler.timesteps:
        options = {"generator": generator} if isinstance(scheduler, DDPMScheduler) else {}
        x, _ = scheduler.step(network(x, t[None]), int(t), x, **options)
    return f"{float(x.std()):.4f}"


def main() -> None:
    for timesteps, schedule in ((250, "cosine"), (1000, "linear_beta"), (1000, "cosine")):
        define = {"num_train_timesteps": timesteps, "schedule": schedule, "clip_sample": False}
        scheduler = DDPMScheduler(**define)
        print(f"\n**T = {timesteps}, {schedule}**\n\n| solver | spacing | " + " | ".join(map(str, STEPS)) + " |")
        print("| --- | --- |" + " --- |" * len(STEPS))
        for solver in SOLVERS:
            for spacing, sigma_max in (("linspace", None), ("trailing", None), ("logsnr", None), ("logsnr", 160)):
                where = spacing if sigma_max is None else f"{spacing}, sigma_max {sigma_max}"
                cells = [ours(scheduler, solver, spacing, sigma_max, n) for n in STEPS]
                print(f"| `{solver}` | {where} | " + " | ".join(cells) + " |")
        for name, plain in (("DDPMScheduler", scheduler), ("DDIMScheduler", DDIMScheduler(**define))):
            print(f"| MONAI {name} | its own | " + " | ".join(monais(plain, n) for n in STEPS) + " |")


if __name__ == "__main__":
    main()

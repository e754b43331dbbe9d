"""Does a classifier of real images name the class that was asked for? Prints confusion tables as Markdown.

    python tests/benchmarks/class_table.py --dataset output/training/dataset.json --folders guidance_1 guidance_3

The classifier, MONAI's `Classifier`, is trained on real images alone, those that the generator was trained on, and then
fixed. It first names the held-out images, a yardstick, then those of each folder. The class of a file is the innermost
of its folders that is one of the dataset's classes. All pass the transforms of the preset. Where a folder has as many
images of each class, chance is 1 / classes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from monai.bundle import ConfigParser  # noqa: E402
from monai.networks.nets import Classifier  # noqa: E402
from monai.transforms import Compose, RandAffine, RandFlip  # noqa: E402

from scripts.scans.classes import with_classes  # noqa: E402
from scripts.scans.find import find_images  # noqa: E402

AFFINE = {"rotate_range": 0.2, "translate_range": (3, 3), "scale_range": 0.1, "padding_mode": "border"}


def images_of(files: list[dict], names: list[str], transform: Compose) -> tuple[torch.Tensor, torch.Tensor]:
    """Preprocessed images (N, 1, *spatial) in [-1, 1] of files in folders of their class, and their labels (N,)."""
    items = with_classes(files, names, None, os.path.commonpath([item["image"] for item in files]))
    images = [transform({"image": item["image"]})["image"].float() for item in items]
    return torch.stack(images), torch.tensor([item["class_label"] for item in items])


def trained(images: torch.Tensor, labels: torch.Tensor, num_classes: int, epochs: int, seed: int = 0) -> Classifier:
    """A classifier of all the images, by AdamW with a one-cycle rate, flips and small affine changes."""
    torch.manual_seed(seed)
    network = Classifier(images.shape[1:], num_classes, (32, 64, 128, 128), (2, 2, 2, 2), num_res_units=1, dropout=0.2)
    change = Compose([RandFlip(prob=0.5, spatial_axis=0), RandAffine(prob=0.8, **AFFINE)])
    change.set_random_state(seed)
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, weight_decay=0.01)
    steps = -(-len(images) // 64)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, epochs * steps)
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    for _ in range(epochs):
        network.train()
        for chosen in torch.randperm(len(images)).split(64):
            batch = torch.stack([change(image).as_tensor() for image in images[chosen]])
            loss = loss_of(network(batch), labels[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    return network.eval()


@torch.no_grad()
def confusion(network: Classifier, images: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """(asked for, named) counts."""
    named = torch.cat([network(batch).argmax(1) for batch in images.split(256)])
    return torch.bincount(labels * num_classes + named, minlength=num_classes**2).reshape(num_classes, num_classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", required=True, help="dataset.json of a training with class_names")
    parser.add_argument("--folders", nargs="*", default=[])
    parser.add_argument("--preset", default=str(ROOT / "configs/presets/mridiff.json"))
    parser.add_argument("--epochs", type=int, default=15)
    args = parser.parse_args()
    config = ConfigParser()
    config.read_config([ROOT / "configs/train.json", args.preset])
    transform, dims = config.get_parsed_content("train#preprocessing"), len(config["spatial_shape"])
    dataset = json.loads(Path(args.dataset).read_text())
    names = list(dataset["classes"])
    training, held_out = ([{"image": path} for path in dataset[side]] for side in ("training", "validation"))
    network = trained(*images_of(training, names, transform), len(names), args.epochs)
    shown = {"held out": held_out} | {folder: find_images(folder, None, dims) for folder in args.folders}
    for title, files in shown.items():
        table = confusion(network, *images_of(files, names, transform), len(names))
        print(f"\n{title}: {table.trace().item()} of {table.sum().item()} as asked\n")
        print("| asked for | " + " | ".join(names) + " | right |\n| --- |" + " --- |" * (len(names) + 1))
        for name, row, right in zip(names, table.tolist(), (table.diagonal() / table.sum(1)).tolist()):
            print(f"| {name} | " + " | ".join(map(str, row)) + f" | {right:.0%} |")


if __name__ == "__main__":
    main()

"""Caches that change nothing, orders that resume, and random transforms that depend on (seed, draw) alone."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from itertools import islice

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import ROOT, preprocessing
from monai.data import DataLoader
from monai.transforms import Compose, LoadImaged, RandFlipd, RandGaussianNoised, RandScaleIntensityd

from scripts.running.errors import BundleError
from scripts.scans import cache as disk_cache
from scripts.scans.cache import hash_of
from scripts.scans.datasets import VolumeDataset, summarise
from scripts.scans.draws import DrawSampler, RepeatSampler
from scripts.scans.find import find_images

CACHES = ("memory", "disk", "none")


def augmentation():
    """Three transforms that each draw random numbers; built anew, for it carries state."""
    return Compose(
        [
            RandFlipd("image", prob=0.5, spatial_axis=0),
            RandScaleIntensityd("image", factors=0.2, prob=1.0),
            RandGaussianNoised("image", prob=0.7, std=0.1),
        ]
    )


def in_memory(count=5, transform=augmentation, **options):
    """A dataset of small random volumes that needs no files."""
    volumes = torch.from_numpy(np.random.default_rng(0).random((count, 1, 3, 4, 5), dtype=np.float32))
    data = [{"image": volume} for volume in volumes]
    return VolumeDataset(data, lambda item: item, transform and transform(), cache="none", **options)


@pytest.fixture
def scans(cohort):
    return find_images(str(cohort))[:3]


# volumes


def test_every_cache_gives_the_same_items(scans, tmp_path):
    items = {}
    for cache in CACHES:
        dataset = VolumeDataset(scans, preprocessing(), augmentation(), cache, str(tmp_path), seed=2)
        assert len(dataset) == 3
        items[cache] = [dataset[i % 3, draw] for draw, i in enumerate((0, 1, 2, 2, 1, 0))]
    expected = preprocessing()(scans[1])["image"].float()
    plain = VolumeDataset(scans, preprocessing(), None, "memory")[1]
    assert torch.equal(plain["image"], expected) and plain["draw"] == 1
    for found in zip(*items.values(), strict=True):
        assert len({item["draw"] for item in found}) == 1
        assert all(torch.equal(item["image"], found[0]["image"]) for item in found)
        assert all(item["image"].dtype == torch.float32 and item["image"].is_contiguous() for item in found)
        assert all(type(item["image"]) is torch.Tensor and set(item) == {"image", "draw"} for item in found)


def test_an_augmented_item_leaves_the_cached_volume_as_it_was(scans):
    dataset = VolumeDataset(scans, preprocessing(), augmentation(), "memory")
    before = dataset.volumes[0]["image"].clone()
    assert not torch.equal(dataset[0, 3]["image"], before.float())
    assert torch.equal(dataset.volumes[0]["image"], before)


@pytest.mark.parametrize("cache, reads", [("memory", 3), ("disk", 3), ("none", 12)])
def test_a_cache_reads_each_file_once(cache, reads, scans, tmp_path, monkeypatch):
    seen, load = [], LoadImaged.__call__

    def counted(self, item, *arguments):
        seen.append(item["image"])
        return load(self, item, *arguments)

    monkeypatch.setattr(LoadImaged, "__call__", counted)
    dataset = VolumeDataset(scans, preprocessing(), None, cache, str(tmp_path))
    for _ in range(4):
        for i in range(3):
            dataset[i]
    assert len(seen) == reads and set(seen) == {scan["image"] for scan in scans}


def test_the_disk_cache_serves_the_next_run(scans, tmp_path, monkeypatch):
    first = VolumeDataset(scans, preprocessing(), None, "disk", str(tmp_path))
    expected = [first[i]["image"] for i in range(3)]
    monkeypatch.setattr(LoadImaged, "__call__", lambda *_: pytest.fail("a file was read"))
    second = VolumeDataset(scans[::-1], preprocessing(), None, "disk", str(tmp_path))
    assert all(torch.equal(second[2 - i]["image"], expected[i]) for i in range(3))
    np.testing.assert_array_equal(second.voxel_sizes(), first.voxel_sizes()[::-1])


def test_the_disk_cache_keeps_apart_what_was_preprocessed_otherwise(scans, tmp_path):
    shapes = []
    for side in (16, 12, 16):
        dataset = VolumeDataset(scans, preprocessing(side), None, "disk", str(tmp_path))
        shapes.append(dataset[0]["image"].shape)
    assert shapes == [(1, 16, 16, 16), (1, 12, 12, 12), (1, 16, 16, 16)]
    assert len(list(tmp_path.rglob("*.pt"))) == 2


def test_the_disk_cache_reads_a_file_anew_that_was_replaced(scans, tmp_path):
    """Otherwise a corrected scan under its old name would never reach the network."""
    path = tmp_path / "scan.nii"
    cubes = []
    for moment, source in enumerate(scans[:2]):
        nib.save(nib.load(source["image"]), path)  # of the same size
        os.utime(path, ns=(0, 10**18 + moment))
        cubes.append(VolumeDataset([{"image": str(path)}], preprocessing(), None, "disk", str(tmp_path / "cache"))[0])
    assert torch.equal(cubes[1]["image"], preprocessing()(scans[1])["image"].float())
    assert not torch.equal(cubes[0]["image"], cubes[1]["image"])


@pytest.mark.parametrize("kept", [0, 100, 4000, -10])
def test_a_half_written_file_in_the_disk_cache_is_made_anew(kept, scans, tmp_path):
    dataset = VolumeDataset(scans[:1], preprocessing(), None, "disk", str(tmp_path))
    expected = dataset[0]["image"]
    (cached,) = tmp_path.rglob("*.pt")
    whole = cached.read_bytes()
    cached.write_bytes(whole[:kept])
    assert torch.equal(dataset[0]["image"], expected)
    assert torch.equal(torch.load(cached)["image"].float(), expected)


@pytest.mark.parametrize("cache", ["ram", "", None, True])
def test_an_unknown_cache_names_the_known_ones(cache, scans):
    with pytest.raises(BundleError, match=f"cache: {cache!r} is unknown.*'memory', 'disk', 'none'"):
        VolumeDataset(scans, preprocessing(), cache=cache)


def test_an_empty_dataset_is_empty(tmp_path):
    for cache in CACHES:
        dataset = VolumeDataset([], preprocessing(), augmentation(), cache, str(tmp_path))
        assert len(dataset) == 0 and len(dataset.voxel_sizes()) == 0
        assert list(DrawSampler(dataset, 2)) == [] == list(RepeatSampler(dataset))


# random transforms


def test_an_augmentation_is_a_function_of_seed_and_draw():
    keys = [(draw % 5, draw) for draw in range(20)]
    forwards, backwards, other = in_memory(seed=1), in_memory(seed=1), in_memory(seed=2)
    expected = {key: forwards[key]["image"] for key in keys}
    for key in keys[::-1]:
        assert torch.equal(backwards[key]["image"], expected[key])
    assert sum(torch.equal(other[key]["image"], expected[key]) for key in keys) == 0
    repeated = [in_memory(seed=1)[0, draw]["image"] for draw in range(20)]
    assert len({tuple(image.flatten().tolist()) for image in repeated}) == 20


def test_no_global_random_number_is_used_or_consumed():
    dataset = in_memory(seed=1)
    np.random.seed(0)
    torch.manual_seed(0)
    first = dataset[2, 7]["image"]
    after = (np.random.random(), torch.rand(1).item())
    np.random.seed(0)
    torch.manual_seed(0)
    assert after == (np.random.random(), torch.rand(1).item())
    assert torch.equal(dataset[2, 7]["image"], first)


def test_a_plain_index_is_its_own_draw():
    dataset = in_memory(seed=4)
    for index in (0, np.int64(3)):
        assert dataset[index]["draw"] == index
        assert torch.equal(dataset[index]["image"], dataset[int(index), int(index)]["image"])


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_batches_do_not_depend_on_the_number_of_workers(cache, scans):
    def batches(num_workers):
        dataset = VolumeDataset(scans, preprocessing(), augmentation(), cache, seed=3)
        sampler = DrawSampler(dataset, 2, seed=3)
        return list(islice(DataLoader(dataset, batch_size=2, sampler=sampler, num_workers=num_workers), 5))

    for one, two in zip(batches(0), batches(2), strict=True):
        assert one["draw"].tolist() == two["draw"].tolist()
        assert torch.equal(one["image"], two["image"]) and one["image"].shape == (2, 1, 16, 16, 16)


# order


@pytest.mark.parametrize("count, batch_size", [(7, 2), (6, 3), (3, 8), (1, 1)])
def test_every_volume_comes_once_an_epoch(count, batch_size):
    stream = list(islice(DrawSampler(range(count), batch_size, seed=1), 6 * count))
    assert [draw for _, draw in stream] == list(range(6 * count))
    epochs = [tuple(index for index, _ in stream[i : i + count]) for i in range(0, 6 * count, count)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    if count > 5:
        assert len(set(epochs)) > 4  # each epoch has an order of its own
        assert epochs[0] != tuple(i for i, _ in islice(DrawSampler(range(count), 2, seed=2), count))


@pytest.mark.parametrize("count, batch_size", [(7, 2), (6, 3), (3, 8)])
def test_the_stream_goes_on_at_any_iteration(count, batch_size):
    whole = list(islice(DrawSampler(range(count), batch_size, seed=5), 200))
    for iteration in (0, 1, 3, 4, 11, 20):
        sampler = DrawSampler(range(count), batch_size, seed=5)
        sampler.iteration = iteration
        assert list(islice(sampler, 30)) == whole[iteration * batch_size :][:30]


def test_orders_are_evenly_random():
    """The first volume of an epoch is each of four equally often: 500 of 2000, standard deviation 19."""
    stream = list(islice(DrawSampler(range(4), 1, seed=0), 8000))
    counts = np.bincount([index for index, _ in stream[::4]], minlength=4)
    assert counts.min() > 400 and counts.max() < 600


def test_batches_are_whole_across_the_ends_of_epochs_and_resume():
    def batches(iteration, count):
        dataset = in_memory(3, seed=6)
        sampler = DrawSampler(dataset, 5, seed=6)
        sampler.iteration = iteration
        return list(islice(DataLoader(dataset, batch_size=5, sampler=sampler), count))

    whole = batches(0, 6)
    assert all(len(batch["draw"]) == 5 for batch in whole)  # more than there are volumes
    for before, after in zip(whole[4:], batches(4, 2), strict=True):
        assert before["draw"].tolist() == after["draw"].tolist() and torch.equal(before["image"], after["image"])


def test_validation_repeats_every_volume_in_a_row():
    sampler = RepeatSampler(range(3), repeats=2)
    expected = [(0, 0), (0, 1), (1, 2), (1, 3), (2, 4), (2, 5)]
    assert list(sampler) == expected == list(sampler) and len(sampler) == 6


def test_validation_batches_are_the_same_at_any_batch_size():
    dataset = in_memory(3, transform=None)
    for batch_size in (1, 4, 5):
        batches = list(DataLoader(dataset, batch_size=batch_size, sampler=RepeatSampler(dataset)))
        assert torch.cat([batch["draw"] for batch in batches]).tolist() == list(range(12))
        images = torch.cat([batch["image"] for batch in batches])
        assert torch.equal(images, torch.stack([dataset[i]["image"] for i in range(3) for _ in range(4)]))


# summary


def sized(sizes, cache="none"):
    """A dataset whose volumes have these voxel sizes."""
    data = [{"image": f"/d/{i}.nii", "mm": size} for i, size in enumerate(sizes)]
    return VolumeDataset(data, lambda item: {"voxel_size": torch.tensor(item["mm"])}, cache=cache)


def test_the_summary_says_what_was_trained_on(tmp_path):
    sizes = [[1.0, 2.0, 3.0], [2.0, 2.5, 3.0], [6.0, 2.1, 3.3]]
    path = tmp_path / "new" / "folder" / "dataset.json"
    median = summarise(sized(sizes), sized(sizes[:1]), (16, 20, 12), str(path))
    summary = json.loads(path.read_text())
    assert median == pytest.approx([2.0, 2.1, 3.0])
    assert summary["voxel_size_mm"]["median"] == median
    assert summary["voxel_size_mm"]["mean"] == pytest.approx([3.0, 2.2, 3.1])
    assert summary["voxel_size_mm"]["min"] == pytest.approx([1.0, 2.0, 3.0])
    assert summary["voxel_size_mm"]["max"] == pytest.approx([6.0, 2.5, 3.3])
    assert summary["spatial_shape"] == [16, 20, 12]
    assert summary["training"] == ["/d/0.nii", "/d/1.nii", "/d/2.nii"] and summary["validation"] == ["/d/0.nii"]


def test_the_summary_of_scans_has_the_voxel_size_of_their_cubes(cohort, scans, tmp_path):
    """By hand: the box of the voxels above 0, two voxels of margin, 8 mm a voxel, over 16 voxels of the cube."""
    expected = []
    for scan in scans:
        box = np.array(np.nonzero(np.asarray(nib.load(scan["image"]).dataobj)))
        low, high = np.maximum(box.min(1) - 2, 0), np.minimum(box.max(1) + 3, 20)
        expected.append((high - low).max() * 8 / 16)
    dataset = VolumeDataset(scans, preprocessing(), cache="memory")
    median = summarise(dataset, dataset, [16] * 3, str(tmp_path / "dataset.json"))
    assert max(median) == pytest.approx(np.median(expected), abs=0.01)


def test_voxel_sizes_are_read_of_evenly_chosen_volumes():
    cached = sized([[float(i)] * 3 for i in range(199)], "memory").voxel_sizes()
    assert cached.tolist() == [[float(i)] * 3 for i in range(0, 199, 2)]
    uncached = sized([[float(i)] * 3 for i in range(15)]).voxel_sizes()  # each would be preprocessed for it
    assert uncached.tolist() == [[float(i)] * 3 for i in range(0, 15, 2)]


def test_equal_content_has_one_hash_whichever_objects_it_is_made_of():
    word, same = "image", "".join(["im", "age"])
    assert word is not same
    assert (
        hash_of([word, word, {"size": 3}]) == hash_of([word, same, {"size": 3}]) != hash_of([word, "mask", {"size": 3}])
    )


# what goes wrong while data is read


HASH = """
import sys
sys.path[:0] = {paths!r}
from conftest import preprocessing
from scripts.scans.datasets import VolumeDataset
print(VolumeDataset([], preprocessing(), None, "disk", {cache!r}).volumes.transform_hash)
"""


def test_the_hash_of_a_preprocessing_is_the_same_in_every_process(tmp_path):
    here = VolumeDataset([], preprocessing(), None, "disk", str(tmp_path)).volumes.transform_hash
    code = HASH.format(paths=[str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/scans")], cache=str(tmp_path))
    env = dict(os.environ, PYTHONHASHSEED="7", OMP_NUM_THREADS="1")
    there = subprocess.run([sys.executable, "-W", "ignore", "-c", code], env=env, capture_output=True, text=True)
    assert there.stdout.strip() == here, there.stderr


def test_the_disk_cache_is_dropped_when_the_code_changes_and_says_what_is_left(scans, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    VolumeDataset(scans, preprocessing(), None, "disk", str(tmp_path))[0]
    disk_cache.mention_others.cache_clear()
    monkeypatch.setattr(disk_cache, "version_of_code", lambda: "another")
    VolumeDataset(scans, preprocessing(), None, "disk", str(tmp_path))[0]
    assert len(list(tmp_path.rglob("*.pt"))) == 2
    assert "also holds 1 volumes (0 MB) of other settings or versions, which may be deleted" in caplog.text


def test_what_a_transform_has_read_is_not_part_of_its_hash(scans, tmp_path):
    """MONAI's `NibabelReader` remembers the files that it has read."""
    transform = preprocessing()
    first = VolumeDataset(scans, transform, None, "disk", str(tmp_path))
    first[0]
    second = VolumeDataset(scans, transform, None, "disk", str(tmp_path))
    assert first.volumes.folder == second.volumes.folder


def test_what_a_killed_run_left_half_written_is_removed(scans, tmp_path):
    folder = VolumeDataset(scans, preprocessing(), None, "disk", str(tmp_path)).volumes.folder
    folder.mkdir(exist_ok=True)
    ended = subprocess.Popen(["true"])
    ended.wait()
    host, old, new = socket.gethostname(), time.time() - 4000, time.time()
    kept = {f"a.{os.getpid()}@{host}.partial": new, f"b.{ended.pid}@another.host.partial": new}
    removed = {f"c.{ended.pid}@{host}.partial": new, f"d.{ended.pid}@another.host.partial": old}
    removed[f"e.{os.getpid()}@{host}.partial"] = old
    for name, changed in (kept | removed).items():
        (folder / name).touch()
        os.utime(folder / name, (changed, changed))
    VolumeDataset(scans, preprocessing(), None, "disk", str(tmp_path))
    assert {path.name for path in folder.iterdir()} == set(kept)


def test_a_cache_that_cannot_be_written_stops_nothing_and_is_said_once(scans, tmp_path, caplog, monkeypatch):
    dataset = VolumeDataset(scans, preprocessing(), None, "disk", str(tmp_path))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    for i in range(3):
        assert torch.equal(dataset[i]["image"], preprocessing()(scans[i])["image"].float())
    assert caplog.text.count("could not be written") == 1 and "No space left" in caplog.text
    assert list(tmp_path.rglob("*.p*")) == []


@pytest.mark.parametrize("cache", CACHES)
def test_a_file_that_has_vanished_is_named(cache, scans, tmp_path):
    gone = tmp_path / "gone.nii.gz"
    with pytest.raises(BundleError, match="gone.nii.gz' cannot be read now .there is no such file any more"):
        VolumeDataset([{"image": str(gone)}], preprocessing(), None, cache, str(tmp_path / "cache"))[0]

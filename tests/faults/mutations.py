"""More than fifty damaged or hostile NIfTI files, each a mutation of one volume whose voxels are known.

`python tests/faults/mutations.py FOLDER` writes them and prints what the checks say of each, under a limit of memory
and of time: a line of JSON a file.
"""

from __future__ import annotations

import gzip
import io
import json
import resource
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE = (16, 18, 20)
AFFINE = np.diag([2.0, 2.0, 2.5, 1.0])
VOXELS = np.random.default_rng(0).integers(0, 250, SHAPE).astype(np.int16)
VOXELS[:3], VOXELS[-3:] = 0, 0
MEMORY, SECONDS = 2 * 2**30, 30  # on top of what the imports take; for one file
LITTLE = {"dim": 40, "datatype": 70, "bitpix": 72, "pixdim": 76, "vox_offset": 108, "scl_slope": 112, "magic": 344}


def whole(voxels: np.ndarray = VOXELS, affine: np.ndarray = AFFINE, kind: type = nib.Nifti1Image, **header) -> bytes:
    """An uncompressed file; `header`: fields to set."""
    image = kind(voxels, affine)
    for key, value in header.items():
        image.header[key] = value
    return image.to_bytes()


def with_field(form: str, place: int, *values: float) -> bytes:
    """The file with other numbers at one place of its header."""
    content = bytearray(whole())
    struct.pack_into(f"<{form}", content, place, *values)
    return bytes(content)


def flipped(content: bytes, seed: int, first: int = 0, last: int | None = None) -> bytes:
    """One random bit between two bytes is another one."""
    generator = np.random.default_rng(seed)
    place, bit = int(generator.integers(first, last or len(content))), int(generator.integers(8))
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def cut(content: bytes, seed: int) -> bytes:
    return content[: int(np.random.default_rng(seed).integers(1, len(content)))]


def packed(content: bytes) -> bytes:
    return gzip.compress(content, mtime=0)


def bomb(header: bytes, gigabytes: float) -> bytes:
    """A header, and zeros without end behind it, a thousandth of their size when compressed."""
    out, block = io.BytesIO(), bytes(2**24)
    with gzip.GzipFile(fileobj=out, mode="wb", mtime=0, compresslevel=1) as file:
        file.write(header)
        for _ in range(int(gigabytes * 2**30) // len(block)):
            file.write(block)
    return out.getvalue()


def with_extension(size: int, content: bytes = b"a comment") -> bytes:
    """The file with an extension that claims `size` bytes."""
    data = whole()
    body = struct.pack("<ii", size, 6) + content.ljust(24, b"\0")
    header = bytearray(data[:348] + b"\1\0\0\0" + body)
    struct.pack_into("<f", header, LITTLE["vox_offset"], len(header))
    return bytes(header) + data[352:]


def real(value: float) -> np.ndarray:
    voxels = VOXELS.astype(np.float32)
    voxels[8, 9, 10] = value
    return voxels


COLOURS = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
COLOURS["R"] = VOXELS
RAW, GZ = whole(), packed(whole())
SWAPPED = nib.Nifti1Image(VOXELS.astype(">i2"), AFFINE, nib.Nifti1Header(endianness=">")).to_bytes()

# name: the content of the file; those not in RIGHT must be refused
MUTATIONS: dict[str, Callable[[], bytes]] = {
    # truncated
    **{f"cut_{seed}.nii": lambda seed=seed: cut(RAW, seed) for seed in range(4)},
    **{f"cut_{seed}.nii.gz": lambda seed=seed: cut(GZ, seed) for seed in range(4, 8)},
    "empty.nii": lambda: b"",
    "empty.nii.gz": lambda: b"",
    "last_byte_missing.nii": lambda: RAW[:-1],
    "checksum_missing.nii.gz": lambda: GZ[:-8],
    # bits flipped: gzip has a checksum over everything
    **{f"bit_{seed}.nii.gz": lambda seed=seed: flipped(GZ, seed, 10) for seed in range(10, 18)},
    "gzip_checksum.nii.gz": lambda: flipped(GZ, 18, len(GZ) - 8, len(GZ) - 4),
    # dimensions
    "one_dimension_smaller.nii": lambda: with_field("h", LITTLE["dim"] + 2, 15),
    "one_dimension_larger.nii": lambda: with_field("h", LITTLE["dim"] + 4, 19),
    "negative_dimension.nii": lambda: with_field("h", LITTLE["dim"] + 2, -16),
    "zero_dimension.nii": lambda: with_field("h", LITTLE["dim"] + 6, 0),
    "two_axes.nii": lambda: with_field("h", LITTLE["dim"], 2),
    "ninety_axes.nii": lambda: with_field("h", LITTLE["dim"], 90),
    "claims_30000_cubed.nii": lambda: with_field("hhh", LITTLE["dim"] + 2, 30000, 30000, 30000),
    "claims_30000_cubed.nii.gz": lambda: packed(with_field("hhh", LITTLE["dim"] + 2, 30000, 30000, 30000)),
    # gzip bombs
    "bomb_behind_the_voxels.nii.gz": lambda: bomb(RAW, 4),
    "bomb_of_honest_size.nii.gz": lambda: bomb(with_field("hhh", LITTLE["dim"] + 2, 1400, 1400, 1400)[:352], 5.2),
    "bomb_before_the_voxels.nii.gz": lambda: bomb(with_field("f", LITTLE["vox_offset"], 4e9)[:352], 4),
    "bomb_in_an_extension.nii.gz": lambda: bomb(with_extension(2**31 - 16)[:360], 2.5),
    # other fields
    "wrong_magic.nii": lambda: RAW[:344] + b"n+9\0" + RAW[348:],
    "magic_of_a_pair.nii": lambda: RAW[:344] + b"ni1\0" + RAW[348:],
    "header_of_another_size.nii": lambda: with_field("i", 0, 1543569408 + 7),
    "huge_vox_offset.nii": lambda: with_field("f", LITTLE["vox_offset"], 1e30),
    "vox_offset_zero.nii": lambda: with_field("f", LITTLE["vox_offset"], 0),
    "vox_offset_nan.nii": lambda: with_field("f", LITTLE["vox_offset"], np.nan),
    "vox_offset_beyond_the_end.nii": lambda: with_field("f", LITTLE["vox_offset"], 20000),
    "vox_offset_in_the_header.nii": lambda: with_field("f", LITTLE["vox_offset"], 64),
    "bitpix_of_another_type.nii": lambda: with_field("h", LITTLE["bitpix"], 32),
    "type_of_another_size.nii": lambda: with_field("h", LITTLE["datatype"], 2),
    "unknown_type.nii": lambda: with_field("h", LITTLE["datatype"], 77),
    "affine_nan.nii": lambda: with_field("f", 280, np.nan),
    "affine_of_zeros.nii": lambda: with_field("12f", 280, *[0] * 12),
    "zero_pixdim.nii": lambda: with_field("f", LITTLE["pixdim"] + 4, 0),
    "another_pixdim.nii": lambda: with_field("f", LITTLE["pixdim"] + 8, 2.2),
    "zero_pixdim_and_no_affine.nii": lambda: with_field("f", LITTLE["pixdim"] + 4, 0)[:252] + bytes(4) + RAW[256:],
    "voxels_a_kilometre_long.nii": lambda: with_field("f", 280, 1e9),
    "voxels_a_thousand_times_longer.nii": lambda: whole(affine=np.diag([2.0, 2e4, 2e-2, 1])),
    "scaled_by_infinity.nii": lambda: with_field("ff", LITTLE["scl_slope"], 1, np.inf),
    "scaled_beyond_float32.nii": lambda: with_field("f", LITTLE["scl_slope"], 3e38),
    # voxels
    "nan.nii.gz": lambda: packed(whole(real(np.nan))),
    "infinity.nii": lambda: whole(real(np.inf)),
    "complex.nii.gz": lambda: packed(whole(VOXELS.astype(np.complex64))),
    "colours.nii.gz": lambda: packed(whole(COLOURS)),
    "one_value.nii.gz": lambda: packed(whole(np.full(SHAPE, 7, np.int16))),
    # extensions, other byte orders and formats: unusual, and right
    "extension_of_no_size.nii": lambda: with_extension(0),
    "huge_extension.nii": lambda: with_extension(2**31 - 16),
    "extension.nii": lambda: with_extension(32),
    "other_byte_order.nii": lambda: SWAPPED,
    "second_format.nii.gz": lambda: packed(whole(kind=nib.Nifti2Image)),
    "two_members.nii.gz": lambda: packed(RAW[:5000]) + packed(RAW[5000:]),
    "bits_of_the_gzip_header.nii.gz": lambda: flipped(GZ, 19, 4, 8),
}
RIGHT = {
    "magic_of_a_pair.nii",  # as nibabel and others take it
    "header_of_another_size.nii",
    "extension.nii",
    "other_byte_order.nii",
    "second_format.nii.gz",
    "two_members.nii.gz",
    "bits_of_the_gzip_header.nii.gz",
}


def write_all(folder: Path) -> None:
    for name, content in MUTATIONS.items():
        (folder / name).write_bytes(content())


def judge(path: Path) -> dict:
    """What the checks say, and whether the voxels that training would load are those of VOXELS."""
    from monai.transforms import LoadImage

    from scripts.scans.inspect import examine

    problem = examine(str(path)).problem
    if problem:
        return {"name": path.name, "problem": problem}
    loaded = LoadImage(reader="NibabelReader", ensure_channel_first=True)(str(path))
    same = loaded.shape == (1, *SHAPE) and bool((loaded.numpy()[0] == VOXELS).all())
    return {"name": path.name, "problem": "", "same": same and bool((loaded.affine.numpy() == AFFINE).all())}


def main(folder: str) -> None:
    import scripts.scans.inspect  # noqa: F401  before the limit

    def too_long(*_: object) -> None:
        raise SystemExit("a file took too long")

    signal.signal(signal.SIGALRM, too_long)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    for name in MUTATIONS:
        signal.alarm(SECONDS)
        print(json.dumps(judge(Path(folder, name))), flush=True)
    signal.alarm(0)
    print(json.dumps({"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}))


if __name__ == "__main__":
    write_all(Path(sys.argv[1]))
    main(sys.argv[1])

"""From the file of a photo to the square that the network takes, beside Pillow's plain way."""

import statistics
import tempfile
from pathlib import Path

import torch
from PIL import Image
from reports import Cell, Report, Table
from timing import beside, in_turns, photos, ratio
from torch import Tensor
from torchvision.transforms.v2 import functional

from mcar_lib.data.squares import ResizedImages

SIZES, PHOTOS, ROUNDS = (128, 224, 448), 64, 5
DECODED, PLAIN, DISK, MEMORY = "decoded", "Pillow's plain way", "squares on disk", "squares in memory"
TOLD = 224  # px, in README


def plain(path: Path, size: int) -> Tensor:
    """(3, size, size) uint8: opened, decoded and resized by Pillow, bilinearly."""
    with Image.open(path) as image:
        square = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return functional.pil_to_tensor(square)


def measure(quick: bool) -> Report:
    images = photos(4 if quick else PHOTOS)
    torch.set_num_threads(1)
    rows: list[tuple[Cell, ...]] = []
    findings = []
    with tempfile.TemporaryDirectory() as scratch:
        for size in SIZES:
            files, memory = ResizedImages(images, size, 0), ResizedImages(images, size, 1 << 40)
            disk = ResizedImages(images, size, file=Path(scratch) / f"squares-{size}")

            def all_of(squares: ResizedImages) -> None:
                for index in range(len(images)):
                    squares[index].clone()

            arms = {
                DECODED: lambda: all_of(files),  # noqa: B023 (called in this turn of the loop)
                PLAIN: lambda: [plain(path, size) for path in images.paths],  # noqa: B023
                DISK: lambda: all_of(disk),  # noqa: B023
                MEMORY: lambda: all_of(memory),  # noqa: B023
            }
            seconds = in_turns(arms, 1 if quick else ROUNDS)
            each = {name: 1000 * statistics.median(found) / len(images) for name, found in seconds.items()}
            apart = [
                (files[index].int() - plain(path, size).int()).abs().float().mean().item()
                for index, path in enumerate(images.paths)
            ]
            rows.append((size, *each.values(), ratio(seconds, DECODED, PLAIN), statistics.mean(apart)))
            findings.append(
                beside(
                    seconds,
                    each,
                    DECODED,
                    PLAIN,
                    what=f"reading a photo, {size} px",
                    unit="ms a photo",
                    in_readme=size == TOLD,
                )
            )
    columns = (
        *("px", *(f"{name}, ms" for name in (DECODED, PLAIN, DISK, MEMORY))),
        *("decoded to Pillow's, times", "pixels apart, levels of 255"),
    )
    return Report(
        title="Reading photos",
        about=f"{len(images)} photos of VOC 2007 on one core, from the file to a square of 3 x S x S bytes. Decoded: "
        f"as training reads a photo whose square is not kept. {PLAIN}: open, convert and resize with Pillow, "
        "bilinearly. Squares are what is left to do in later epochs.",
        findings=tuple(findings),
        tables=(Table(heading="All sizes", columns=columns, rows=tuple(rows)),),
        notes=("The ways take turns; medians over rounds. How many cores feed a GPU: benchmarks/reader.md.",),
    )

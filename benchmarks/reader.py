"""How fast photos are read for training, each way, and whether a device has to wait for them.

    python benchmarks/reader.py [--data-root DIR] [--photos 256] [--gpu] [--write FILE.md]

DIR holds VOCdevkit/VOC2007 (by default $MCAR_DATA); without one, composed scenes are read, whose files are smaller than
photos. Every rate is that of one core, from the file to the square that the network input is made of, flipped and with
its colour jitter drawn; medians of rounds in which the ways take turns. "With jitter" does the jitter in the reader, a
photo after another, as it was done before; today it is a few operations on a whole batch where the model is. The device
is a clock: a step of 16 photos takes as long as it would at so many images a second, and no core. Takes ten minutes.
--gpu times training steps on a real one instead, and the share of them in which it waited for photos; in two minutes.
"""

import argparse
import contextlib
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from timing import machine, print_report, report_parser
from torch import Tensor
from torchvision.transforms.v2 import functional

from mcar_lib.data import ImageSet, load_image_set
from mcar_lib.data.squares import ResizedImages
from mcar_lib.data.transforms import crop_and_flip, jitter_colours, resize_square, sample_generator
from mcar_lib.model import build_mcar
from mcar_lib.runs.environment import describe_environment
from mcar_lib.training import Execution, Recipe, TrainingImages, fit
from mcar_lib.training.reader import Reader, num_workers

SIZES = (224, 448, 576)
BATCH, ROUNDS = 16, 5
SPEEDS = (300, 2000)  # images a second of the clock
NEEDS = (100, 300, 1000, 2000)
AT = 448  # px of the clock
ON_GPU = (("mobilenet_v2", 224), ("mobilenet_v2", 448), ("resnet101", 448))
SCENES = {"num_train": 256, "num_test": 16, "side": 480, "seed": 0}


def photos(options: argparse.Namespace, scratch: Path) -> ImageSet:
    if options.data_root:
        found = load_image_set("voc2007", "train", options.data_root)
    else:
        found = load_image_set("scenes", "train", scratch, **SCENES)
    return found.select(range(min(options.photos, len(found))))


def reduced(path: Path, size: int) -> Tensor:
    """Decoded at the least scale of JPEG (1/2, 1/4, 1/8) that is no smaller than the square."""
    with Image.open(path) as image:
        image.draft("RGB", (size, size))
        return resize_square(functional.pil_to_tensor(image.convert("RGB")), size)


def with_former_jitter(image: Tensor, index: int) -> Tensor:
    """One operation after the other on one photo, each only as it is drawn."""
    image, (kinds, factors) = crop_and_flip(image, sample_generator(0, 0, index))
    adjust = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    for kind, factor in zip(kinds.tolist(), factors.tolist(), strict=True):
        image = adjust[kind](image, factor)
    return image


def ways(images: ImageSet, size: int, scratch: Path) -> dict[str, Callable[[int], object]]:
    """What reads the photo at an index, by name."""
    files, memory = ResizedImages(images, size, 0), ResizedImages(images, size, 1 << 40)
    with contextlib.redirect_stdout(None):
        disk = ResizedImages(images, size, file=scratch / f"squares-{size}")

    def drawn(image: Tensor, index: int) -> object:
        return crop_and_flip(image, sample_generator(0, 0, index))

    return {
        "decoded, with jitter (formerly)": lambda index: with_former_jitter(files[index], index),
        "decoded": lambda index: drawn(files[index], index),
        "decoded at reduced scale": lambda index: drawn(reduced(images.paths[index], size), index),
        "squares on disk": lambda index: drawn(disk[index].clone(), index),
        "squares in memory": lambda index: drawn(memory[index].clone(), index),
    }


def rates(images: ImageSet, size: int, scratch: Path) -> dict[str, float]:
    """Photos a second of one core, by way."""
    each = ways(images, size, scratch)
    seconds: dict[str, list[float]] = {name: [] for name in each}
    for number in range(ROUNDS + 1):
        for name, read in each.items():
            started = time.perf_counter()
            for index in range(len(images)):
                read(index)
            if number:  # the first round fills caches
                seconds[name].append(time.perf_counter() - started)
    return {name: len(images) / statistics.median(found) for name, found in seconds.items()}


def difference(images: ImageSet, size: int) -> tuple[float, float]:
    """Between squares of photos decoded at reduced scale and in full, in levels: the mean and the largest, over all."""
    found = [
        (reduced(path, size).int() - resize_square(images.image(index), size).int()).abs().float()
        for index, path in enumerate(images.paths)
    ]
    return statistics.mean(each.mean().item() for each in found), max(each.max().item() for each in found)


def busy(images: ImageSet, on_disk: bool, workers: int, speed: float, scratch: Path) -> float:
    """The share of time in which the clock computes, over three passes; the first batch is waited for beforehand."""
    file = scratch / f"squares-{AT}" if on_disk else None
    training = TrainingImages(ResizedImages(images, AT, 0, file=file), Recipe(batch_size=BATCH))
    reader = Reader(training.batch, workers, BATCH * 3 * AT * AT, torch.device("cpu"))
    order = [index for epoch in range(3) for index in training.order(epoch)]
    tasks = [(0, order[first : first + BATCH]) for first in range(0, len(order), BATCH)]
    batches = reader.batches(tasks)
    next(batches)
    started, steps, free_at = time.perf_counter(), 0, time.perf_counter()
    for _ in batches:
        # The device takes the batch when it is done with the one before it.
        free_at = max(free_at, time.perf_counter()) + BATCH / speed
        steps += 1
        time.sleep(max(0, free_at - time.perf_counter() - BATCH / speed))
    reader.close()
    ended = max(free_at, time.perf_counter())
    return steps * BATCH / speed / (ended - started)


def share_of_step(
    images: ResizedImages, recipe: Recipe, scratch: Path, backbone: str = "mobilenet_v2", workers: int | None = 0
) -> tuple[float, float]:
    """Seconds of an MCAR training step on this device in the last epoch, and the share of it in which no photos were
    there."""
    model = build_mcar(backbone, len(images.image_set.classes), "none")
    with contextlib.redirect_stdout(None), tempfile.TemporaryDirectory(dir=scratch) as folder:
        result = fit(model, images, None, recipe, Path(folder), Execution(workers=workers), verbose=False).history[-1]
    return result.train_seconds / math.ceil(len(images) / BATCH), result.wait_seconds / result.train_seconds


def jitter_seconds(size: int) -> float:
    """Of the jitter of one batch on this CPU."""
    images = torch.randint(256, (BATCH, 3, size, size), dtype=torch.uint8)
    kinds = torch.stack([torch.randperm(3) for _ in range(BATCH)])
    found = []
    for _ in range(ROUNDS + 1):
        started = time.perf_counter()
        jitter_colours(images, kinds, torch.rand(BATCH, 3) + 0.5)
        found.append(time.perf_counter() - started)
    return statistics.median(found[1:])


def table(columns: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows)]


def report(options: argparse.Namespace, scratch: Path) -> str:
    torch.set_num_threads(1)
    images = photos(options, scratch)
    found = {size: rates(images, size, scratch) for size in SIZES}
    names = list(found[SIZES[0]])
    lines = ["### Photos a second and core", ""]
    lines += table(
        ["way", *(f"{size} px" for size in SIZES)], [[n, *(f"{found[s][n]:,.0f}" for s in SIZES)] for n in names]
    )
    apart = [
        f"{size} px: {mean:.2f} on average, {most:.0f} at most"
        for size in SIZES
        for mean, most in [difference(images, size)]
    ]
    lines += ["", f"Reduced scale differs from a full decode, in levels of 255: {'; '.join(apart)}."]
    lines += ["", "### Cores that feed a GPU", ""]
    rows = [
        [f"{need:,}", str(size), *(str(math.ceil(need / found[size][name])) for name in ("decoded", "squares on disk"))]
        for size in SIZES
        for need in NEEDS
    ]
    lines += table(["the GPU trains, images/s", "px", "cores: decoded", "cores: squares on disk"], rows)
    lines += ["", f"### Share of time in which a device computes, {AT} px", ""]
    rows = [
        [
            f"{speed:,}",
            str(workers),
            *(f"{100 * busy(images, on_disk, workers, speed, scratch):.0f} %" for on_disk in (False, True)),
        ]
        for speed in SPEEDS
        for workers in (0, 1, 2)
    ]
    lines += table(["the device trains, images/s", "workers", "decoded", "squares on disk"], rows)
    torch.set_num_threads(os.cpu_count() or 1)
    lines += ["", "### Share of a training step on this CPU, no workers", ""]
    rows = []
    for size in (128, 224):
        for jitter in (0.0, 0.3):
            few = ResizedImages(images.select(range(min(6 * BATCH, len(images)))), size)
            seconds, waits = share_of_step(few, Recipe(epochs=2, batch_size=BATCH, jitter=jitter), scratch)
            rows.append(
                [
                    str(size),
                    f"{jitter:g}",
                    f"{seconds:.2f}",
                    f"{100 * waits:.1f} %",
                    f"{1000 * jitter_seconds(size) if jitter else 0:.0f} ms",
                ]
            )
    lines += table(["px", "jitter", "s a step", "of it waiting for photos", "of it jitter"], rows)
    lines += ["", f"{images.title}: {len(images)} photos; MobileNet-v2, N = 4, batch {BATCH}. {machine()}"]
    return "\n".join(lines)


def gpu_report(options: argparse.Namespace, scratch: Path) -> str:
    """The share of real training steps on a GPU in which it waits; bf16, jitter, workers as training chooses them."""
    once, rows = photos(options, scratch), []
    images = once.select([index for _ in range(8) for index in range(len(once))])  # a pass starts with a wait
    for backbone, size in ON_GPU:
        for way, memory in (("decoded", 0), ("squares in memory", 1 << 40)):
            squares = ResizedImages(images, size, memory)
            recipe = Recipe(epochs=2, batch_size=BATCH, precision="bf16")
            seconds, waits = share_of_step(squares, recipe, scratch, backbone, workers=None)
            workers = num_workers(None, torch.device("cuda"), decodes=way == "decoded")
            cells = (f"{BATCH / seconds:,.0f}", f"{1000 * seconds:.0f}", f"{100 * waits:.1f} %")
            rows.append([backbone, str(size), way, str(workers), *cells])
    columns = ["backbone", "px", "photos", "workers", "images/s", "ms a step", "of it waiting for photos"]
    told = (
        f"{len(once)} photos of {once.name}, each eight times a pass, the second pass is timed; N = 4, batch {BATCH}, "
    )
    told += "bf16, jitter 0.3."
    device = describe_environment()["device"]
    return "\n".join(["### On a GPU", "", *table(columns, rows), "", f"{told} Device: {device}. {machine()}"])


def main() -> None:
    parser = report_parser(__doc__)
    parser.add_argument("--data-root", type=Path, default=os.environ.get("MCAR_DATA"), help="holds VOCdevkit/VOC2007")
    parser.add_argument("--photos", type=int, default=256, help="how many are read in a round")
    parser.add_argument("--gpu", action="store_true", help="steps on this machine's GPU only")
    options = parser.parse_args()
    if options.gpu and not torch.cuda.is_available():
        parser.error("--gpu: there is none here")
    with tempfile.TemporaryDirectory() as scratch:
        print_report((gpu_report if options.gpu else report)(options, Path(scratch)), options.write)


if __name__ == "__main__":
    main()

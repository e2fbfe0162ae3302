"""Images a second of training and inference, beside the backbone alone on N + 1 times as many images.

    python benchmarks/throughput.py [--models resnet101:448 ...] [--batch 16] [--precision bf16] [--write FILE.md]

MCAR runs its backbone on every photo and on N crops of it, so the backbone alone (features, pooling, classifier: the
global stream) on (N + 1) times as many images is what it cannot go far below; what it takes longer is the region module
and the second pass. Training is forward, backward and an SGD step; inference ends with the scores on the CPU. Images
are random bytes on the device, normalised in the timed step as in training; reading and resizing photos is not timed.
Weights are random, 80 classes, gwp pooling, channels_last. Without options: every backbone and size of the paper, as it
is and with torch.compile of the backbone; a row that cannot run says why. throughput.md is from a GPU. For a CPU there
are inference.py and training.py, which make bench runs.
"""

import argparse
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from steps import CLASSES, inference, training
from timing import machine, median_seconds, print_report, report_parser

from mcar_lib.inference import keep_freed_memory
from mcar_lib.model import MCAR, build_mcar
from mcar_lib.runs.environment import PeakMemory, describe_environment

OF_THE_PAPER = (
    *("mobilenet_v2:256", "resnet50:256", "resnet101:256"),
    *("mobilenet_v2:448", "resnet50:448", "resnet101:448", "resnet101:576"),
)
RECOMPUTED = "training, activations of the crops computed again"
COLUMNS = (
    *("backbone", "px", "compiled", "what", "MCAR images/s", "backbone alone, images/s", "MCAR takes"),
    "peak memory of both, GiB",
)


class Timed(NamedTuple):
    """Seconds of one step, and the peak of memory in bytes: of the GPU, else of the process (0: not known)."""

    seconds: float
    peak: int


JOBS = {"training": training, RECOMPUTED: training, "inference": inference}


def timed(step: Callable[[], object], options: argparse.Namespace) -> Timed:
    on_gpu = torch.cuda.is_available()

    def whole_step() -> None:
        step()
        if on_gpu:
            torch.cuda.synchronize()

    for _ in range(options.warmup):
        whole_step()
    memory = PeakMemory()
    return Timed(median_seconds(whole_step, options.repeats), memory.bytes or 0)


def build(backbone: str, compiled: bool, options: argparse.Namespace, device: torch.device) -> MCAR:
    torch.manual_seed(0)
    torch.compiler.reset()
    model = build_mcar(backbone, CLASSES, "none", pooling="gwp", num_regions=options.regions)
    model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compiled:
        model.features = torch.compile(model.features)  # type: ignore[assignment]
    return model


def measure(name: str, compiled: bool, what: str, options: argparse.Namespace) -> list[str]:
    """The last cells of one row: both rates in photos a second, their ratio, both peaks; or why there are none."""
    backbone, size = name.split(":")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = []
    try:
        for local_stream, times in ((True, 1), (False, options.regions + 1)):
            model = build(backbone, compiled, options, device)
            model.local_stream, model.recompute = local_stream, what == RECOMPUTED
            shape = (times * options.batch, 3, int(size), int(size))
            images = torch.randint(256, shape, dtype=torch.uint8, device=device)
            found.append(timed(JOBS[what](model, images, options.precision), options))
            del model, images
    except RuntimeError as error:  # out of memory, and whatever torch.compile raises
        torch.cuda.empty_cache()
        return [f"cannot run: {type(error).__name__}", "-", "-", "-"]
    both, alone = found
    memory = f"{both.peak / 2**30:.1f}, {alone.peak / 2**30:.1f}" if both.peak else "-"
    rates = [f"{options.batch / one.seconds:.1f}" for one in found]
    return [*rates, f"{100 * both.seconds / alone.seconds:.0f} % of its time", memory]


def report(options: argparse.Namespace) -> str:
    keep_freed_memory()
    rows = []
    for name in options.models:
        for compiled in {"both": (False, True), "yes": (True,), "no": (False,)}[options.compile]:
            for what in JOBS:
                cells = [*name.split(":"), "yes" if compiled else "no", what]
                rows.append(f"| {' | '.join([*cells, *measure(name, compiled, what, options)])} |")
                print(rows[-1], file=sys.stderr, flush=True)
    device = describe_environment()["device"]
    more = options.regions + 1
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}", *rows, ""]
    lines += [
        f"{options.batch} photos a step, N = {options.regions}, {options.precision}, channels_last; "
        f"medians of {options.repeats} steps after {options.warmup + 1}. The backbone alone has {more} times as many "
        f"images a step; its rate counts {more} of them as one photo. Reading photos is not timed.",
        *(["torch.compile was not measured (--compile no)."] if options.compile == "no" else []),
        f"Device: {device}. {machine()}",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = report_parser(__doc__)
    parser.add_argument(
        "--models", nargs="+", default=OF_THE_PAPER, metavar="BACKBONE:SIZE", help="the paper's, if none"
    )
    parser.add_argument("--batch", type=int, default=16, help="photos a step (the paper: 16)")
    parser.add_argument("--regions", type=int, default=4, help="N (the paper: 4)")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--compile", choices=("both", "yes", "no"), default="both", help="of the backbone")
    parser.add_argument("--repeats", type=int, default=10, help="timed steps a row")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them, and one more")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own number, if none")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    print_report(report(options), options.write)


if __name__ == "__main__":
    main()

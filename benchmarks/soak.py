"""Kills training again and again, lets sessions race, reads meanwhile: the numbers must stay, and no file may be torn.

    python benchmarks/soak.py [--rounds 20] [--pairs 60] [--workers 0] [--seed 0]

A round trains a run of a few seconds (scenes, `mcar train`, a checkpoint every fraction of a second) and kills it one
to three times, with SIGKILL, SIGTERM and SIGINT in turn: at a moment drawn at random, in the middle of an epoch, or as
soon as a file of its is there or being written; it is started again until it is done. Metrics and weights must be those
of a run that nobody killed, bit for bit, and nothing may be left over. A signal that training has noted must end it
with 75, one before or after training with 130 or 143, and at least one must have found it training. A pair is two
sessions that make one comparison at once. Meanwhile a reader reads every record, status, checkpoint, score and weights
file. Ends with 1 on any difference.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mcar_lib.errors import RESUMABLE, MCARError
from mcar_lib.files import check_zip, read_json
from mcar_lib.runs import Profile, Runs, compare
from mcar_lib.weights import read_state_dict

PROFILE = {
    "name": "soak",
    "title": "soak",
    "seeds": [0],
    "bootstrap_resamples": 200,
    "threads": 1,
    "run": {
        "data_options": {"num_train": 48, "num_test": 16, "side": 64, "seed": 3},
        **{"dataset": "scenes", "backbone": "mobilenet_v2", "weights": "none", "image_size": 32, "num_regions": 2},
        **{"epochs": 3, "batch_size": 8, "learning_rate": 0.05, "schedule": "onecycle", "jitter": 0.0},
    },
}
FILES = ("checkpoint.pt", ".checkpoint*.part", "checkpoint-previous.pt", "scores.npz", "model.safetensors", "runs/*")
MOMENTS = ("any", "training", "training", *FILES)
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CHECKPOINT_MINUTES = 0.002
TRAINING = "training scenes-"  # a line of the log says so
NOTED = "after this step a checkpoint is written"  # another, once a signal is to end the training
WRONG = "WRONG:"
ENOUGH_ROUNDS = 10  # for some signal to find a run training
LONGEST = 300.0  # seconds that a command may take


class Place:
    """Results and artifacts of one round."""

    def __init__(self, folder: Path, workers: int, data: Path | None = None) -> None:
        self.folder, self.results, self.artifacts = folder, folder / "results", folder / "artifacts"
        self.workers = workers
        folder.mkdir()
        (folder / "soak.toml").write_text(_toml(PROFILE), encoding="utf-8")
        if data is not None:
            shutil.copytree(data, self.artifacts / "data")

    def start(self) -> "subprocess.Popen[bytes]":
        """mcar train in a process group of its own."""
        options = ["--profile", "soak.toml", "--results", str(self.results), "--artifacts", str(self.artifacts)]
        options += ["--checkpoint-minutes", str(CHECKPOINT_MINUTES), "--workers", str(self.workers)]
        with (self.folder / "log").open("ab") as log:
            self.log_start = log.tell()
            return subprocess.Popen(
                [sys.executable, "-m", "mcar_lib", "train", *options],
                cwd=self.folder,
                env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent), "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def told(self) -> str:
        """What the command that was started last has printed."""
        return (self.folder / "log").read_bytes()[self.log_start :].decode(errors="replace")

    def found(self, moment: str) -> bool:
        """Whether a moment has come at which the run is to be killed: it trains, or a file is there."""
        if moment == "training":
            return TRAINING in self.told()
        top = self.results / "soak" if "/" in moment else self.artifacts / "runs"
        return any(True for _ in top.glob(moment if "/" in moment else f"*/{moment}"))

    def outcome(self) -> tuple[str, str, list[str]]:
        """Metrics, a hash of the weights, and what should not be there."""
        (record,) = (self.results / "soak" / "runs").glob("[!.]*.json")
        (weights,) = self.artifacts.glob("runs/*/model.safetensors")
        left = [*self.artifacts.glob("runs/*/checkpoint*"), *self.folder.rglob("*.part")]
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        return json.dumps(read_json(record)["metrics"]), digest, [str(path) for path in left]


def _toml(values: dict[str, Any]) -> str:
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if not isinstance(value, dict)]
    for key, table in values.items():
        if isinstance(table, dict):
            options = ", ".join(f"{name} = {value}" for name, value in table["data_options"].items())
            lines += [f"[{key}]", f"data_options = {{ {options} }}"]
            lines += [f"{name} = {json.dumps(value)}" for name, value in table.items() if name != "data_options"]
    return "\n".join(lines) + "\n"


class Reader(threading.Thread):
    """Reads whatever lies in a folder, over and over, and counts what is torn."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.reads, self.torn, self.going = folder, 0, Counter[str](), True

    def run(self) -> None:
        readers = {".json": read_json, ".npz": check_zip, ".safetensors": read_state_dict, ".pt": check_zip}
        while self.going:
            paths = [Path(top) / name for top, _, names in os.walk(self.folder) for name in names]  # passes over errors
            for path in paths:
                if path.suffix in readers and not path.name.startswith(".") and "data" not in path.parts:
                    try:
                        readers[path.suffix](path)  # type: ignore[operator]
                        self.reads += 1
                    except (MCARError, OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
                        if not any(isinstance(each, FileNotFoundError) for each in (error, error.__cause__)):
                            self.torn[f"{path.name}: {error}"] += 1
            time.sleep(0.002)


def killed_round(place: Place, draw: random.Random, usual: float, signals: Iterator[signal.Signals]) -> Counter[str]:
    """Trains to the end, killed on the way; returns how the killed commands ended, and how often."""
    ends = Counter[str]()
    for _ in range(draw.randint(1, 3)):
        process, started = place.start(), time.monotonic()
        moment = draw.choice(MOMENTS)
        delay = draw.uniform(0, {"any": usual, "training": usual / 2}.get(moment, 0.05))
        while moment != "any" and process.poll() is None and not place.found(moment):
            _check_time(started)
            time.sleep(0.001)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay)
        if process.poll() is None:
            number = next(signals)
            os.killpg(process.pid, number)  # to all its processes, as terminals and Slurm do
            ends[_end(place, number, process.wait(LONGEST))] += 1
    code = place.start().wait(LONGEST)
    if code:
        raise SystemExit(f"mcar train ended with {code}:\n{place.told()}")
    return ends


def _end(place: Place, number: signal.Signals, code: int) -> str:
    """How a command ended that was sent a signal: "done" where it was too late to, WRONG where it must not."""
    allowed: tuple[int, ...] = (-number, 128 + number)  # the former before the program looks at signals, and always 9
    if NOTED in place.told():
        allowed = (RESUMABLE,)
    elif "Fatal Python error" in place.told():  # interrupted while Python itself was starting
        allowed = (1,)
    if code not in (0, *allowed):
        print(f"{number.name}: ended with {code}:\n{place.told()}")
        return f"{WRONG} {code} on {number.name}"
    return "done" if code == 0 else f"{code} on {number.name}"


def _check_time(started: float) -> None:
    if time.monotonic() - started > LONGEST:
        raise SystemExit("mcar train takes too long")


def _compare(place: Path, pairs: int, together: Any, told: Any) -> None:
    """One of two sessions: makes a comparison anew whenever the other does."""
    runs = Runs(Profile.model_validate_json(json.dumps(PROFILE)), place / "results", artifacts=place / "artifacts")
    record = runs.run(runs.profile.run)
    for number in range(pairs):
        try:
            with contextlib.redirect_stdout(None):
                together.wait(LONGEST)
                told.put((number, json.dumps(compare(runs, [record], []))))
                together.wait(LONGEST)
                for path in (runs.local_folder / "comparisons").glob("*.json"):
                    path.unlink(missing_ok=True)
        except (MCARError, OSError) as error:
            told.put((number, f"failed: {error}"))


def raced(place: Path, pairs: int) -> int:
    """Two sessions that make one comparison at once; returns how many of the sessions failed or got another result."""
    context = multiprocessing.get_context("spawn")
    together, told = context.Barrier(2), context.Queue()
    sessions = [context.Process(target=_compare, args=(place, pairs, together, told)) for _ in range(2)]
    for session in sessions:
        session.start()
    results = [told.get(timeout=LONGEST) for _ in range(2 * pairs)]
    for session in sessions:
        session.join()
    usual = Counter(result for _, result in results).most_common(1)[0][0]
    for number, result in results:
        if result != usual:
            print(f"pair {number}: {result}")
    return sum(result != usual for _, result in results) + usual.startswith("failed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="runs that are killed (20)")
    parser.add_argument("--pairs", type=int, default=60, help="comparisons that two sessions make at once (60)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read photos of a run that is killed (0)")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    draw, ends, differences = random.Random(asked.seed), Counter[str](), 0
    signals = itertools.cycle(SIGNALS)
    with tempfile.TemporaryDirectory() as scratch:
        top = Path(scratch)
        reader = Reader(top)
        whole, started = Place(top / "whole", workers=0), time.monotonic()
        if code := whole.start().wait(LONGEST):
            raise SystemExit(f"mcar train ended with {code}:\n{(whole.folder / 'log').read_text()}")
        usual, started = time.monotonic() - started, time.monotonic()
        expected = whole.outcome()
        reader.start()
        for number in range(asked.rounds):
            place = Place(top / f"round-{number}", asked.workers, whole.artifacts / "data")
            ends += killed_round(place, draw, usual, signals)
            found = place.outcome()
            if found != expected:
                differences += 1
                for name, here, there in zip(("metrics", "weights", "left"), found, expected, strict=True):
                    if here != there:
                        print(f"round {number + 1}: {name}: {here} instead of {there}")
            shutil.rmtree(place.folder, ignore_errors=True)
            print(f"round {number + 1} of {asked.rounds}: {ends.total()} kills, {differences} differences", flush=True)
        failed = raced(whole.folder, asked.pairs) if asked.pairs else 0
        reader.going = False
        reader.join()
        for torn, count in reader.torn.items():
            print(f"torn {count} times: {torn}")
        for end, count in sorted(ends.items()):
            print(f"{count} times: {end}")
        wrong = sum(count for end, count in ends.items() if end.startswith(WRONG))
        untried = asked.rounds >= ENOUGH_ROUNDS and not any(end.startswith(str(RESUMABLE)) for end in ends)
        if untried:
            print("no signal found it training: give more --rounds, or another --seed")
        print(
            f"{asked.rounds} runs with {ends.total()} kills, {asked.pairs} comparisons by two sessions at once, "
            f"{reader.reads:,} reads, {time.monotonic() - started:.0f} s: "
            f"{differences + failed + wrong} differences, {sum(reader.torn.values())} torn files"
        )
    sys.exit(bool(differences or failed or wrong or untried or reader.torn))


if __name__ == "__main__":
    main()

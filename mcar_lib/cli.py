"""The jobs of this project from a terminal: the command `mcar`, or python -m mcar_lib.

Each command imports what it needs when it runs, so that training works where Jupyter and pandas are not installed, and
help needs no torch.
"""

import contextlib
import csv
import dataclasses
import functools
import inspect
import json
import os
import shlex
import signal
import sys
import threading
import tomllib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from mcar_lib.errors import (
    RESUMABLE,
    CheckpointError,
    ConfigError,
    DataError,
    MCARError,
    ResultsError,
    Stopped,
    WeightsError,
    printable,
)
from mcar_lib.files import project_root, user_path

if TYPE_CHECKING:
    from mcar_lib.data import ImageSet
    from mcar_lib.runs import Record, RunConfig, Runs
    from mcar_lib.runs.published import Beside

EXIT_CODES = {ConfigError: 2, DataError: 3, WeightsError: 4, CheckpointError: 4, ResultsError: 5, MCARError: 1}
EPILOG = (
    "Exit codes: 0 done; 1 a notebook or run failed, or a generated file drifted; 2 wrong usage or configuration; "
    "3 data; 4 weights or checkpoint; 5 results; 75 training was stopped and left a checkpoint of that moment, from "
    "which the same command goes on; 129, 130, 143 stopped by SIGHUP, Ctrl-C, SIGTERM elsewhere."
)
CHECKED = 64  # photos at most, on which an exported graph is held against PyTorch
# What the scores of a checkpoint depend on beside its weights.
RELEASED = (
    *("dataset", "backbone", "pooling", "image_size", "num_regions", "threshold"),
    *("selection", "local_stream", "precision"),
)


WIDEST = 400  # columns of a table that goes to a file or another program: a row is a line there


class Commands(TyperGroup):
    """Turns this project's errors into one message and an exit code; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with _signals_stop():
                return self._invoke(ctx)
        except KeyboardInterrupt as stop:
            if _is_first_to_tell():
                how = f"stopped by {stop.signal.name}" if isinstance(stop, Stopped) else "interrupted"
                typer.echo(f"{how}; the same command goes on from here", err=True)
            resumable = getattr(stop, "resumable", False)
            raise typer.Exit(RESUMABLE if resumable else 128 + getattr(stop, "signal", signal.SIGINT)) from None

    def _invoke(self, ctx: Any) -> Any:
        try:
            with _one_voice():
                return super().invoke(ctx)
        except MCARError as error:
            from mcar_lib.training import processes

            if processes.tells(error):
                typer.echo(f"error: {printable(str(error))}", err=True)
            code = next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
        except ModuleNotFoundError as error:
            if (error.name or "mcar_lib").startswith("mcar_lib"):
                raise
            typer.echo(f"error: this needs the package {error.name}; install it, or requirements.lock", err=True)
            code = EXIT_CODES[ConfigError]
        raise typer.Exit(code)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        found = super().resolve_command(ctx, args)
        if _started_by_torchrun():
            from mcar_lib.training import processes

            processes.check_command(found[0])
        return found


@contextlib.contextmanager
def _signals_stop() -> Iterator[None]:
    """Meanwhile SIGTERM and SIGHUP raise Stopped, once: timeout and terminals send theirs twice. One that is ignored,
    as nohup has it, stays so."""
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
    is_main = threading.current_thread() is threading.main_thread()  # no other may set handlers
    stops = [
        each for each in map(signal.Signals.__getitem__, names) if is_main and signal.getsignal(each) is signal.SIG_DFL
    ]

    def stop(number: int, _: object) -> None:
        for each in stops:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    for each in stops:
        signal.signal(each, stop)
    try:
        yield
    finally:
        for each in stops:
            signal.signal(each, signal.SIG_DFL)


def _is_first_to_tell() -> bool:
    if not _started_by_torchrun():
        return True
    from mcar_lib.training import processes

    return processes.is_first_to_tell()


def _started_by_torchrun() -> bool:
    return "LOCAL_RANK" in os.environ  # as mcar_lib.training.processes, which imports torch, has it


def _one_voice() -> contextlib.AbstractContextManager[None]:
    if not _started_by_torchrun():
        return contextlib.nullcontext()
    from mcar_lib.training import processes

    return processes.only_main_prints()


app = typer.Typer(
    cls=Commands, epilog=EPILOG, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


class Action(StrEnum):
    GET = "get"
    PREPARE = "prepare"
    CHECK = "check"


class Digits(StrEnum):
    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


class Place(StrEnum):
    LOCAL = "local"
    SLURM = "slurm"


# Options that commands share -----------------------------------------------------------------------------------------


def _typed_path(text: str) -> Path:
    try:
        return user_path(text)
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


PATH: dict[str, Any] = {"parser": _typed_path, "metavar": "<path>"}
ProfileName = Annotated[str, typer.Option("--profile", help="smoke, mini, photos, paper, or a path ending in .toml.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of the run, as in TOML; repeatable.")]
ResultsFolder = Annotated[Path | None, typer.Option("--results", **PATH, help="Where own results go (results/local).")]
DataRoot = Annotated[Path | None, typer.Option("--data-root", **PATH, help="Where photos are ($MCAR_DATA).")]
Artifacts = Annotated[
    Path | None, typer.Option("--artifacts", **PATH, help="Weights, scores, scenes ($MCAR_ARTIFACTS).")
]
Release = Annotated[
    bool, typer.Option("--release", help="The checkpoint is one of the paper's release; its name says its settings.")
]


Jobs = Annotated[
    int | None,
    typer.Option(
        min=1,
        envvar="MCAR_JOBS",
        help="Runs trained side by side, at most (as many as the cores allow); fewer where memory does not hold them.",
    ),
]


@dataclass(frozen=True)
class Asked:
    """The run that a command is about, and where its files are: the options of about_a_run."""

    profile: Annotated[
        str | None,
        typer.Option(help="smoke, mini (if none is named; with --release paper), photos, paper, or a path to .toml."),
    ] = None
    row: Annotated[
        str | None, typer.Option(help="A row of the profile, such as voc2007-resnet101-448; see mcar plan.")
    ] = None
    settings: Settings = None
    results: ResultsFolder = None
    data_root: DataRoot = None
    artifacts: Artifacts = None
    workers: Annotated[
        int | None,
        typer.Option(min=0, envvar="MCAR_WORKERS", help="Processes that read photos; 0: none."),
    ] = None
    cache: Annotated[
        str, typer.Option(envvar="MCAR_CACHE", help="Where resized photos are kept: auto, memory, disk, none.")
    ] = "auto"

    def open(self, **execution: Any) -> tuple["Runs", "RunConfig"]:
        """The runs of the profile, and its run or row with changes: options of its data set are added to, another's
        start anew. execution: what is said of it beside the options."""
        from mcar_lib.runs import Runs
        from mcar_lib.training import Execution

        carried_out = Execution(self.workers, self.cache, **execution)  # type: ignore[arg-type]
        folders = (self.results and self.results.resolve(), self.data_root, self.artifacts)
        runs = Runs(self.profile or "mini", *folders, execution=carried_out)
        run = runs.profile.row(self.row) if self.row else runs.profile.run
        changes = parse_settings(self.settings or [])
        known = run.data_options if changes.get("dataset", run.dataset) == run.dataset else {}
        if isinstance(changes.setdefault("data_options", {}), dict):
            changes["data_options"] = {**known, **changes["data_options"]}
        return runs, run.vary(**changes)

    def open_checkpoint(
        self, checkpoint: Path | None, release: bool, shown: Sequence[str] = RELEASED
    ) -> tuple["Runs", "RunConfig", dict[str, Any] | None]:
        """As open, with what the checkpoint says of itself and no option does: a released one by its name, an exported
        one by its header, which is given too. Prints where values are from."""
        from mcar_lib.released import read_header
        from mcar_lib.weights import release_settings

        if checkpoint is None:
            if release:
                raise typer.BadParameter("--release needs --checkpoint FILE")
            return *self.open(), None
        settings, header, named = self.settings or [], read_header(checkpoint), dict[str, Any]()
        profile, options = self.profile or ("paper" if release else "mini"), parse_settings(settings)
        if header and release:
            raise typer.BadParameter(f"{checkpoint} is a file that mcar export wrote; leave --release out")
        if release:
            named = release_settings(checkpoint)
            if not named:
                form = "<dataset>-<backbone>-<pooling>-<size>-<N>-<tau>"
                typer.echo(f"{checkpoint}: the name does not say {form}", err=True)
        elif header:
            named = header.config.model_dump()
        else:
            typer.echo(f"{checkpoint}: holds no settings; they are those of the profile and the options", err=True)
        # The release scores in float32, and so do exported files.
        values = {**({"precision": "fp32"} if release or header else {}), **named}
        taken = [f"{key}={json.dumps(value)}" for key, value in values.items() if key not in options]
        runs, config = dataclasses.replace(self, profile=profile, settings=[*taken, *settings]).open()
        origins = dict.fromkeys(values, "the name" if release else "the file") | dict.fromkeys(options, "an option")
        if release and "precision" not in options:
            origins["precision"] = "the release"
        for key in shown:
            typer.echo(f"{key} = {getattr(config, key)}, from {origins.get(key, f'the profile {profile}')}")
        return runs, config, header.model_dump() if header else None

    def as_options(self) -> str:
        """The same run and folders, as a command line names them."""
        options = ["--profile", self.profile or "mini", *(["--row", self.row] if self.row else [])]
        options += [part for text in self.settings or () for part in ("--set", text)]
        for name in ("results", "data_root", "artifacts"):
            folder = getattr(self, name)
            options += [f"--{name.replace('_', '-')}", str(folder)] if folder else []
        return shlex.join(options)


def about_a_run(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of Asked in place of its parameter asked."""
    shared = inspect.signature(Asked).parameters
    own = [each for name, each in inspect.signature(command).parameters.items() if name != "asked"]

    @functools.wraps(command)
    def called(**given: Any) -> None:
        command(asked=Asked(**{name: given.pop(name) for name in shared}), **given)

    together = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*own, *shared.values())]
    called.__signature__ = inspect.Signature(together)  # type: ignore[attr-defined]  # typer reads it
    return called


def parse_settings(texts: Sequence[str]) -> dict[str, Any]:
    """["epochs=3", "data_options.side=64"] -> {"epochs": 3, "data_options": {"side": 64}}; no TOML means a string."""
    lines = []
    for text in texts:
        key, equals, value = text.partition("=")
        try:
            tomllib.loads(f"value = {value}")
        except tomllib.TOMLDecodeError:
            text = f"{key} = {json.dumps(value.strip(), ensure_ascii=False)}" if equals else text
        lines.append(text)
    try:
        return tomllib.loads("\n".join(lines))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--set {', '.join(texts)}: not KEY=VALUE, or one key twice ({error})") from error


# Commands ------------------------------------------------------------------------------------------------------------


@app.command()
def reproduce(
    profile: ProfileName = "mini",
    only: Annotated[list[str] | None, typer.Option(help="Notebooks by number; repeatable or 02,03.")] = None,
    results: ResultsFolder = None,
    data_root: DataRoot = None,
    artifacts: Artifacts = None,
    jobs: Jobs = None,
) -> None:
    """Run the notebooks, then compare what they computed here with what is committed."""
    from mcar_lib.notebooks.jobs import reproduce

    reproduce(profile, only or [], results, data_root, artifacts=artifacts, jobs=jobs)


@app.command()
def publish(profile: ProfileName = "mini", artifacts: Artifacts = None) -> None:
    """Make results/local the committed results, and the notebooks show them (for maintainers)."""
    from mcar_lib.notebooks.jobs import publish

    publish(profile, artifacts)


@app.command()
def report(
    check: Annotated[bool, typer.Option("--check", help="Change nothing; exit with 1 if a file differs.")] = False,
    artifacts: Artifacts = None,
) -> None:
    """Run the notebooks over the committed records: every table, figure, README block and output anew."""
    from mcar_lib.notebooks.jobs import report

    report(check, artifacts)


@app.command()
def plan(
    profile: ProfileName = "paper",
    throughput: Annotated[
        list[str] | None,
        typer.Option(help="Million million MACs a second, T or BACKBONE=T; repeatable. Adds the hours of each run."),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Where the profile has rows: the runs of its studies as well.")
    ] = False,
) -> None:
    """Print the runs of a profile with what they cost: images, steps, operations, and hours at a given speed.

    Of a profile with rows these are its rows; of any other all runs: both models, what they are compared with, the
    ablations, and the tuning of their rates."""
    from mcar_lib.runs import load_profile
    from mcar_lib.runs.plan import TESTS_LINE, TUNING_LINE, all_runs, parse_throughput, plan, total_line

    speeds, chosen = parse_throughput(throughput or []), load_profile(profile)
    runs = plan(chosen, profile, everything or not chosen.rows)
    cells = [run.cells(speeds) for run in runs]
    shown = [name for name in cells[0] if any(row[name] is not None for row in cells)]
    _print_table(shown, [[row[name] for name in shown] for row in cells])
    typer.echo(TESTS_LINE)
    if chosen.tuning:
        typer.echo(TUNING_LINE)
    for run in runs:
        typer.echo(run.command)
    typer.echo(total_line(runs, speeds))
    if left := len(all_runs(chosen)) - len(runs):
        typer.echo(f"left out: {left} runs of the studies; --all shows them")


@app.command()
@about_a_run
def train(
    asked: Asked,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Two steps and one test batch; nothing is kept.")] = False,
    checkpoint_minutes: Annotated[
        float,
        typer.Option(min=0, envvar="MCAR_CHECKPOINT_MINUTES", help="Between two checkpoints within an epoch."),
    ] = 10,
    track: Annotated[
        list[str] | None,
        typer.Option(envvar="MCAR_TRACKERS", help="tensorboard, wandb, ...: where an epoch's scalars go; repeatable."),
    ] = None,
    recompute: Annotated[
        bool,
        typer.Option(
            "--recompute", envvar="MCAR_RECOMPUTE", help="Less memory, more time: activations are computed twice."
        ),
    ] = False,
    memory: Annotated[
        float | None,
        typer.Option(
            min=0.1,
            envvar="MCAR_MEMORY",
            help="GiB to stay within: activations are computed twice where that is enough, with the same numbers; else "
            "in bf16, unless --set precision says otherwise.",
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(**PATH, help="Photos of your own: a CSV, a COCO .json, folders of classes, a YOLO or VOC folder."),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option("--from", help="Starting weights: voc-photos, a .safetensors of mcar export, imagenet, ..."),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.1, help="With --data: about how long to train, if size and epochs are open (5)."),
    ] = None,
    skip_unreadable: Annotated[
        bool, typer.Option("--skip-unreadable", help="With --data: go on without the photos that cannot be read.")
    ] = False,
) -> None:
    """Train one run, or find it if it was trained before, and print its metrics.

    With --data on photos of your own: what is in them is told; size, batch and epochs that fit this machine are
    proposed from two measured passes, unless --set says them; the val split, or a held-out fifth, is scored.

    SIGINT, SIGTERM or SIGHUP end it after the step that it is in, with a checkpoint and exit code 75: the same command
    goes on from there."""
    from mcar_lib.runs.memory import in_half_precision
    from mcar_lib.runs.published import beside_record
    from mcar_lib.runs.records import NO_TEST_LABELS
    from mcar_lib.runs.trainer import dry_run as run_dry

    if data is None and (minutes or skip_unreadable):
        raise typer.BadParameter("--minutes and --skip-unreadable are for --data PATH")
    places = {"results": asked.results, "artifacts": asked.artifacts}
    own = asked.results or project_root() / "results" / "local"
    how = {
        "checkpoint_minutes": checkpoint_minutes,
        "trackers": tuple(name for names in track or () for name in names.split(",")),
        "recompute": recompute,
        "memory": memory,
    }
    asked = dataclasses.replace(asked, results=own)
    if start:
        asked = dataclasses.replace(asked, settings=[f"weights={json.dumps(start)}", *(asked.settings or [])])
    if data is None:
        runs, config = asked.open(**how)
        test = None
    else:
        runs, config, test = _own_run(asked, data, minutes, skip_unreadable, how)
    if memory and "precision" not in parse_settings(asked.settings or []):
        config = in_half_precision(config, runs.data(config).num_images, memory)
    if dry_run:
        for line in run_dry(runs.splits, config, runs.profile.threads, runs.execution).lines:
            typer.echo(line)
        return
    record = runs.run(config)
    typer.echo(f"record: {record.path}")
    if record.is_scored:
        _print_metrics(record.metrics["last"], [] if data is None else ["0.5"])
        _print_beside(beside_record(record))
    else:
        typer.echo(f"{NO_TEST_LABELS}; next: mcar submit voc2012 {asked.as_options()}")
    if data is not None:
        _print_own(runs, record, test, places)


def _own_run(
    asked: Asked, data: Path, minutes: float | None, skip_unreadable: bool, how: Mapping[str, Any]
) -> tuple["Runs", "RunConfig", "ImageSet | None"]:
    """The run on photos of one's own that these options ask for, and the test split if there is one; tells of both."""
    from mcar_lib.runs.own import check_own, own_config
    from mcar_lib.runs.proposal import PROPOSED, propose

    if asked.data_root or asked.row:
        raise typer.BadParameter("--data PATH says what is trained on; leave --data-root and --row out")
    given = parse_settings(asked.settings or [])
    settings = ['dataset="own"', 'scored_on="val"', *(asked.settings or [])]
    if given.get("dataset", "own") != "own" or "scored_on" in given:
        raise typer.BadParameter("--data PATH trains on the data set own and scores its val split")
    settings = settings[1:] if "dataset" in given else settings
    opened = dataclasses.replace(asked, profile=asked.profile or "own", data_root=data, settings=settings)
    runs, config = opened.open(**how)
    checked = check_own(runs, config, skip_unreadable)
    for line in checked.lines:
        typer.echo(printable(line))
    _print_table(checked.counts, zip(*checked.counts.values(), strict=True))
    config = own_config(config, checked, list(given))
    config, line = propose(runs, config, [name for name in PROPOSED if name in given], minutes)
    typer.echo(line)
    return runs, config, checked.own.parts.get("test")


def _print_own(runs: "Runs", record: "Record", test: "ImageSet | None", places: Mapping[str, Path | None]) -> None:
    from mcar_lib.runs.own import metrics_on

    threshold = record.content["decision_threshold"]
    typer.echo(f"labels are predicted from a score of {threshold:.2f}, of the highest OF1 on val")
    behind = 100 * (record.map("global") - record.map())
    if behind > 2:
        typer.echo(
            f"its global scores alone are {behind:.1f} points of mAP better than all together: on these photos the "
            "second look does not help; --set local_stream=false trains without it, in less time"
        )
    if test is not None:
        typer.echo(f"the same model on {test.title}, {len(test):,} images:")
        _print_metrics(metrics_on(runs, record, test), ["0.5"])
    elsewhere = shlex.join(part for name, place in places.items() if place for part in (f"--{name}", str(place)))
    typer.echo(f"next: mcar predict --model {record.run_id} PHOTO --pictures DIR {elsewhere}".rstrip())


@app.command()
def status(
    artifacts: Artifacts = None,
    results: ResultsFolder = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON array, with all that is known of each run.")] = False,
) -> None:
    """List all runs and how they stand: running, waiting, failed, killed, stopped, finished; how far, and why."""
    from mcar_lib.status import all_runs

    places = ((artifacts or os.environ.get("MCAR_ARTIFACTS"), "artifacts"), (results, "results/local"))
    folders = [user_path(given).resolve() if given else project_root() / usual for given, usual in places]
    runs = all_runs(*folders)
    if as_json:
        typer.echo(json.dumps([run.model_dump() for run in runs], indent=1))
    elif runs:
        cells = [run.cells() for run in runs]
        _print_table(cells[0], [list(row.values()) for row in cells])
    else:
        typer.echo(f"no run has left anything in {folders[0]} or {folders[1]}")


@app.command()
def grid(
    profile: ProfileName = "paper",
    rows: Annotated[
        list[str] | None, typer.Option(help="Rows of the profile, all if none is named; repeatable or A,B.")
    ] = None,
    on: Annotated[
        Place, typer.Option(help="This machine, or a Slurm cluster: one job array, one run a job.")
    ] = Place.LOCAL,
    gpus: Annotated[int | None, typer.Option(min=0, help="slurm: GPUs that train a run together (1).")] = None,
    memory: Annotated[float | None, typer.Option(min=0.1, help="slurm: GiB of a run (64).")] = None,
    hours: Annotated[float | None, typer.Option(min=0.05, help="slurm: until a job is queued again (24).")] = None,
    cpus: Annotated[int | None, typer.Option(min=1, help="slurm: cores of a run.")] = None,
    partition: Annotated[str | None, typer.Option(help="slurm: the partition of the jobs.")] = None,
    wait: Annotated[bool | None, typer.Option("--wait", help="slurm: until all runs are done or failed.")] = None,
    jobs: Jobs = None,
    results: ResultsFolder = None,
    data_root: DataRoot = None,
    artifacts: Artifacts = None,
) -> None:
    """Train the rows of a profile, or its main comparison where it has none; what has a record is not trained again.

    Each run that fails fails alone, and the command then exits with 1. The same command goes on: jobs that wait or run
    are left to it. Elsewhere: mcar plan prints one command a run."""
    from mcar_lib.runs import Failure, Runs, find_or_train
    from mcar_lib.runs.grid import outcome_told
    from mcar_lib.runs.plan import named_runs

    options: dict[str, Any] = {
        "gpus": gpus,
        "memory": memory,
        "hours": hours,
        "cpus": cpus,
        "partition": partition,
        "wait": wait,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if on is Place.LOCAL and given:
        raise typer.BadParameter(f"--{next(iter(given))} is for --on slurm")
    if on is Place.SLURM and jobs and not os.environ.get("MCAR_JOBS"):
        raise typer.BadParameter("--jobs is for this machine; Slurm says how many jobs run at once")
    own = results.resolve() if results else project_root() / "results" / "local"
    runs = Runs(profile, own, data_root, artifacts)
    asked = named_runs(runs.profile, [row.strip() for text in rows or () for row in text.split(",")])
    if on is Place.SLURM:
        from mcar_lib.runs import cluster

        given.pop("wait", None)
        submitted = cluster.submit(runs, asked, profile, cluster.Resources(**given))
        typer.echo(f"{len(submitted)} jobs; logs: {runs.artifacts / 'slurm'}; next: mcar status")
        if not wait:
            return
        outcomes = cluster.wait(runs, asked, submitted)
    else:
        outcomes = find_or_train(runs, [each.config for each in asked], jobs)
    for each, outcome in zip(asked, outcomes, strict=True):
        typer.echo(f"{each.name}: {printable(outcome_told(outcome))}")
    if any(isinstance(outcome, Failure) for outcome in outcomes):
        raise typer.Exit(1)


@app.command()
@about_a_run
def evaluate(
    asked: Asked,
    best: Annotated[bool, typer.Option("--best", help="The best epoch on the test set, not the last.")] = False,
    checkpoint: Annotated[Path | None, typer.Option(**PATH, help="Weights to score on the test split.")] = None,
    release: Release = False,
    report: Annotated[
        Path | None, typer.Option(**PATH, help="A .md file to write as well: settings, metrics, AP of each class.")
    ] = None,
) -> None:
    """Print the metrics of a run that was trained before, or of a checkpoint file. Trains nothing.

    A file that mcar export wrote is scored on a data set of its classes, with --set, else as its header says. With
    --release, data set, backbone, pooling, size, N and tau are taken from --set, else from the checkpoint's name
    (coco2014-resnet101-gwp-448-4-0.5, of the file or its folder), else from the profile. Where from is printed, and
    beside what was published, whether it agrees."""
    from mcar_lib.runs import published

    if report:
        published.check_report(report)
    runs, config, about = asked.open_checkpoint(checkpoint, release)
    if checkpoint is not None:
        evaluated = published.score_file(runs.splits, config, checkpoint, release, about, RELEASED, runs.execution)
    else:
        record = _record_of(runs, config)
        typer.echo(f"record: {record.path}")
        evaluated = published.evaluated(record, "best" if best else "last")
    _print_metrics(evaluated.streams)
    _print_beside(evaluated.beside)
    if report:
        evaluated.write(report)
        typer.echo(f"report: {report}")


@app.command()
@about_a_run
def export(
    asked: Asked,
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="[RUN]", help="A run's id, as mcar status tells it, voc-photos, or a .safetensors file."
        ),
    ] = None,
    file: Annotated[
        Path | None, typer.Argument(**{**PATH, "metavar": "[FILE]"}, help="Written: .safetensors, .onnx, .pt2.")
    ] = None,
    output: Annotated[Path | None, typer.Option(**PATH, help="The same as FILE.")] = None,
    run: Annotated[str | None, typer.Option(help="The same as RUN; without either the run is that of --set.")] = None,
    precision: Annotated[
        Digits, typer.Option(help="Of .onnx: fp16 keeps weights in half precision; int8 computes the crops in 8 bits.")
    ] = Digits.FP32,
    check_photos: Annotated[
        Path | None, typer.Option(**PATH, help="Photos on which a graph is held against PyTorch; else drawn squares.")
    ] = None,
    calibrate: Annotated[
        Path | None, typer.Option(**PATH, help="Photos by which int8 chooses its ranges; else those of --check-photos.")
    ] = None,
) -> None:
    """Write a model to hand on: a small fp16 file with a model card (.safetensors), or a graph, region finding
    included, that runs without this library (.onnx by onnxruntime, .pt2 by torch). mcar_lib.load reads all three.

    A graph is written only if it finds the boxes and scores that PyTorch does."""
    output, run = _only_one(output, file, "--output and FILE"), _only_one(run, source, "--run and RUN")
    if output is None:
        raise typer.BadParameter("name the file to write: mcar export RUN model.onnx")
    if run and (asked.row or asked.settings):
        raise typer.BadParameter("RUN, or --run, says all of a run; leave --row and --set out")
    if output.suffix in (".onnx", ".pt2"):
        _export_graph(asked, run, output, precision, check_photos, calibrate)
    elif output.suffix != ".safetensors":
        raise typer.BadParameter(f"{output}: the name must end in .safetensors, .onnx or .pt2")
    elif precision is not Digits.FP32 or check_photos or calibrate:
        raise typer.BadParameter("--precision, --check-photos and --calibrate are for .onnx and .pt2")
    else:
        _export_weights(asked, run, output)


def _only_one(one: Any, other: Any, names: str) -> Any:
    if one is not None and other is not None:
        raise typer.BadParameter(f"{names}: give one of them")
    return other if one is None else one


def _export_weights(asked: Asked, run: str | None, output: Path) -> None:
    from mcar_lib.files import write_text
    from mcar_lib.released import RUN_ID, card_text, check_output, export_run, models_folder, percent, record_of

    check_output(output)
    if run:
        if not RUN_ID.fullmatch(run):
            raise typer.BadParameter(f"{run} is no run's id; a released model is a .safetensors file already: copy it")
        record = record_of(run, asked.results)
        profile = asked.profile or record.content["profile"]
        runs, config = dataclasses.replace(asked, profile=profile).open()[0], record.config
    else:
        runs, config = asked.open()
    _trained_weights(runs, config)  # this command trains nothing
    about = export_run(runs, _record_of(runs, config), output.resolve()).about
    load = output.stem if output.resolve().parent == models_folder().resolve() else str(output)
    write_text(output.with_suffix(".md"), card_text(output.stem, about, load))
    size = output.stat().st_size / 1e6
    typer.echo(f"{output}: {size:.1f} MB, mAP {percent(about['mAP'])} (run: {percent(about['run_mAP'])})")


def _export_graph(
    asked: Asked, run: str | None, output: Path, precision: Digits, check_photos: Path | None, calibrate: Path | None
) -> None:
    from mcar_lib.data.photo_files import find_photos
    from mcar_lib.exported import check_graph_path, int8_told
    from mcar_lib.released import export_graph, load_released

    check_graph_path(output)
    if precision is Digits.INT8 and not (calibrate or check_photos):
        raise typer.BadParameter("int8 needs photos like those it will see: --calibrate FOLDER")
    artifacts = asked.artifacts
    if run is None:
        runs, config = asked.open()
        run, artifacts = _record_of(runs, config).run_id, runs.artifacts
    photos = find_photos([check_photos])[:CHECKED] if check_photos else []
    calibration = find_photos([calibrate]) if calibrate else photos
    released = load_released(run, asked.results, artifacts)
    found = export_graph(released, output.resolve(), photos, precision.value, calibration)
    where = f"{found.images} photos" if photos else f"{found.images} drawn squares"
    typer.echo(
        f"{output}: {output.stat().st_size / 1e6:.1f} MB, {precision.value}; against PyTorch on {where}: {found}"
    )
    if precision is Digits.INT8 and (told := int8_told()):
        typer.echo(told, err=True)


@app.command()
def predict(
    photos: Annotated[list[str], typer.Argument(metavar="PHOTO|FOLDER...", help="Photos, or folders of them.")],
    model: Annotated[
        str, typer.Option(help="One that comes along, a file of mcar export, or the id of a run.")
    ] = "voc-photos",
    pictures: Annotated[
        Path | None, typer.Option(**PATH, help="A folder for the photos with boxes, classes and scores drawn on them.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON array: labels, boxes, the scores of all.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="A row for each label: photo, label, score, box.")] = False,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="The score of a label; by default the model's own.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Photos that are looked at together.")] = 16,
    floor: Annotated[float, typer.Option(help="Cheaper: no second look at regions of a lower global score.")] = 0.0,
    share: Annotated[
        float, typer.Option(help="Cheaper: only at the first regions with this share of all regions' scores.")
    ] = 1.0,
    local_size: Annotated[
        int | None,
        typer.Option(help="Cheaper: crops of so many pixels, a multiple of 32; by default the model's size."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...; by default a GPU where there is one.")] = None,
    results: ResultsFolder = None,
    artifacts: Artifacts = None,
) -> None:
    """Say what is on photos, and where: the classes whose score reaches the model's threshold.

    Boxes are x1 y1 x2 y2 in pixels of the photo, upright. Files that are no photos are listed at the end, with exit
    code 3; all others are done."""
    from mcar_lib.data.photo_files import find_photos, picture_paths
    from mcar_lib.files import made_folder
    from mcar_lib.model import Look
    from mcar_lib.progress import Progress
    from mcar_lib.released import load_released

    if as_json and as_csv:
        raise typer.BadParameter("--json and --csv: choose one of them")
    look = Look(floor, share, local_size)
    files = find_photos(photos)
    drawn = picture_paths(files, made_folder(pictures, "choose another --pictures folder")) if pictures else []
    with warnings.catch_warnings(record=True) as warned:  # of int8 on a processor that is not made for it
        released = load_released(model, results, artifacts).on(device)
        released.look_so(look)
    for warning in warned:
        typer.echo(printable(str(warning.message)), err=True)
    told, failed = list[dict[str, Any]](), list[DataError]()
    with Progress("photos", len(files)) as bar:
        for index, found in enumerate(released.each(files, threshold, batch_size)):
            bar.advance()
            if isinstance(found, DataError):
                failed.append(found)
                continue
            told.append(found.as_dict())  # not the photo: there may be thousands
            if drawn:
                found.picture().save(drawn[index], quality=92)
    if as_json:
        typer.echo(json.dumps(told, indent=1))
    elif as_csv:
        csv.writer(sys.stdout, lineterminator="\n").writerows([LABEL_COLUMNS, *_label_rows(told)])
    elif told:
        typer.echo(f"{model}: {len(released.classes)} classes; a label from {told[0]['threshold']:g}")
        _print_table(
            ["photo", "label", "score %", "box x1 y1 x2 y2"],
            [
                [photo, label or "none", 100 * score if label else None, " ".join(map(str, box)) or None]
                for photo, label, score, *box in _label_rows(told)
            ],
        )
    for each in told:
        for note in each["notes"]:
            typer.echo(printable(f"{each['photo']}: {note}"), err=True)
    for error in failed:
        typer.echo(f"not read: {printable(str(error))}", err=True)
    if failed:
        raise typer.Exit(EXIT_CODES[DataError])


LABEL_COLUMNS = ("photo", "label", "score", "x1", "y1", "x2", "y2")


def _label_rows(told: Iterable[Mapping[str, Any]]) -> Iterator[list[Any]]:
    """A row for each label of each photo, without a box where there is none; one of a photo without labels is empty."""
    for each in told:
        for label in each["labels"] or [{"label": "", "score": "", "box": None}]:
            yield [each["photo"], label["label"], label["score"], *(label["box"] or ())]


@app.command()
@about_a_run
def submit(
    asked: Asked,
    dataset: Annotated[str, typer.Argument(help="voc2012: the one data set whose test labels a server holds.")],
    checkpoint: Annotated[
        Path | None, typer.Option(**PATH, help="Weights to score with; else those of the run.")
    ] = None,
    release: Release = False,
    output: Annotated[Path, typer.Option(**PATH, help="The archive to write.")] = Path("voc2012-test.tar.gz"),
) -> None:
    """Score the photos of VOC2012 test and write the archive that the PASCAL server takes. Trains nothing."""
    from mcar_lib.data import load_voc
    from mcar_lib.runs.trainer import load_checkpoint
    from mcar_lib.submission import check_output, write_voc2012_submission
    from mcar_lib.training import evaluate

    if dataset != "voc2012":
        raise typer.BadParameter(f"{dataset!r}: only the test labels of voc2012 are held by a server")
    # The data set is the command's, whatever the checkpoint was trained on.
    check_output(output)
    runs, config, about = asked.open_checkpoint(checkpoint, release, shown=RELEASED[1:])
    images = load_voc(runs.splits.root_of(dataset), "2012", "test", labelled=False)
    mcar = load_checkpoint(config, images, checkpoint or _trained_weights(runs, config, look=False), release, about)
    runs.splits.check(images)
    squares = runs.splits.squares(images, config.image_size, once=True)
    scores = evaluate(mcar, squares, config.precision, config.seed, execution=runs.execution)
    path = write_voc2012_submission(output, images.ids, images.classes, scores.fused)
    typer.echo(f"{path}: {images.title}, {len(images):,} images, {len(images.classes)} classes")
    if images.is_subset:
        typer.echo(f"the server wants scores of all {images.official_size:,} images")
    typer.echo("upload it, after a login, at http://host.robots.ox.ac.uk:8080: VOC2012, classification, comp2")


@app.command()
def data(
    action: Annotated[Action, typer.Argument(help="check reads all again, whatever prepare left a note of.")],
    name: Annotated[str | None, typer.Argument(metavar="DATASET", help="voc2007, ...: as --dataset.")] = None,
    dataset: Annotated[str | None, typer.Option(help="scenes, voc2007, voc2012, coco2014, table or own.")] = None,
    data_root: DataRoot = None,
    settings: Settings = None,
    artifacts: Artifacts = None,
    keep_archives: Annotated[bool, typer.Option("--keep-archives", help="get: keep the archives too.")] = False,
) -> None:
    """get: fetch voc2007, voc2012 or coco2014, going on where a transfer broke. check, prepare: read every image and
    label, print what is in it and what of the published data set is missing; scenes are composed if need be."""
    from mcar_lib.data import DATA_SETS
    from mcar_lib.data.download import get_data_set
    from mcar_lib.data.published import check_data_set
    from mcar_lib.runs import Runs

    if name and dataset and name != dataset:
        raise typer.BadParameter(f"two data sets: {name} and --dataset {dataset}")
    chosen = name or dataset
    if chosen is None or chosen not in DATA_SETS:
        which = f"unknown data set {chosen!r}" if chosen else "which data set"
        raise typer.BadParameter(f"{which}? mcar data {action} voc2007, for example; there are {', '.join(DATA_SETS)}")
    splits = Runs(data_root=data_root, artifacts=artifacts).splits
    root = splits.root_of(chosen)
    if action is Action.GET:
        if get_data_set(chosen, root, keep_archives=keep_archives):
            typer.echo(f"next: mcar data check {chosen} --data-root {root}")
        return
    check = functools.partial(splits.check, again=action is Action.CHECK)
    given = parse_settings(settings or [])
    options = {**given.pop("data_options", {}), **given}  # as mcar train has them, or without that name before them
    columns = check_data_set(chosen, root, check, typer.echo, **options)
    _print_table(columns, zip(*columns.values(), strict=True))


# What commands share -------------------------------------------------------------------------------------------------


def _record_of(runs: "Runs", config: "RunConfig", look: bool = True) -> "Record":
    record = runs.find(config, look)
    if record is None:
        raise ResultsError(
            f"there is no current record of {config.label} with this data and these weights; "
            "mcar train with the same options makes one"
        )
    return record


def _trained_weights(runs: "Runs", config: "RunConfig", look: bool = True) -> Path:
    """The weights file of a run that was trained before; its data need not be here."""
    from mcar_lib.runs.trainer import arithmetic_fingerprint

    keys = {**_record_of(runs, config, look).content["keys"], "arithmetic": arithmetic_fingerprint()}
    path = runs.outcome(config, keys).weights
    if not path.is_file():
        raise WeightsError(f"{path}: the weights of this run are not on this machine; name some with --checkpoint FILE")
    return path


def _print_metrics(streams: Mapping[str, Any], points: Sequence[str] = ()) -> None:
    """points: of OPERATING_POINTS; all where none is named."""
    from mcar_lib.runs.measures import LABEL_METRICS, STREAMS

    rows = [
        [name, point, *(100 * value for value in (streams[name]["mAP"], *(at[metric] for metric in LABEL_METRICS)))]
        for name in STREAMS
        for point, at in streams[name]["at"].items()
        if not points or point in points
    ]
    _print_table(["stream", "labels at", "mAP %", *LABEL_METRICS], rows)


def _print_beside(beside: "Beside | None") -> None:
    if beside is not None:
        typer.echo(beside.line)


def _print_table(columns: Iterable[str], rows: Iterable[Sequence[object]]) -> None:
    plain = not sys.stdout.isatty()
    table = Table(box=None if plain else box.SIMPLE_HEAD, pad_edge=not plain)
    for name in columns:
        table.add_column(_cell(name), justify="right", overflow="fold")
    for row in rows:
        table.add_row(*map(_cell, row))
    Console(width=WIDEST if plain else None, markup=False, highlight=False).print(table)


def _cell(value: object) -> str:
    if value is None or value != value:  # NaN: nothing to compute it from
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else printable(" ".join(str(value).splitlines()))


def main() -> None:
    """Entry point of the command mcar."""
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a path may be no text
    app(prog_name="mcar")

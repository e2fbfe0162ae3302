"""The jobs of this project from a terminal: the command `mcar`, or python -m mcar_lib.

Each command imports what it needs when it runs, so that training works where Jupyter and pandas are not installed.
"""

import json
import shlex
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from mcar_lib import processes
from mcar_lib.errors import CheckpointError, ConfigError, DataError, MCARError, ResultsError, WeightsError

if TYPE_CHECKING:
    from mcar_lib.config import RunConfig
    from mcar_lib.data import ImageSet
    from mcar_lib.experiment import Record, Workspace
    from mcar_lib.model import MCAR
    from mcar_lib.recipe import MeanStd, StreamScores

EXIT_CODES = {ConfigError: 2, DataError: 3, WeightsError: 4, CheckpointError: 4, ResultsError: 5, MCARError: 1}
EPILOG = (
    "Exit codes: 0 done; 1 a notebook or run failed, or a generated file drifted; 2 wrong usage or configuration; "
    "3 data; 4 weights or checkpoint; 5 results; 130 interrupted."
)
# What the scores of a checkpoint depend on beside its weights.
RELEASED = (
    *("dataset", "backbone", "pooling", "image_size", "num_regions", "threshold"),
    *("selection", "local_stream", "precision"),
)
LABEL_METRICS = ("CP", "CR", "CF1", "OP", "OR", "OF1")


class Commands(TyperGroup):
    """Turns this project's errors into one message and an exit code; anything else is a bug and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with processes.one_voice():
                return super().invoke(ctx)
        except MCARError as error:
            if processes.tells(error):
                typer.echo(f"error: {error}", err=True)
            code = next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
        except ModuleNotFoundError as error:
            if (error.name or "mcar_lib").startswith("mcar_lib"):
                raise
            typer.echo(f"error: this needs the package {error.name}; install it, or requirements.lock", err=True)
            code = EXIT_CODES[ConfigError]
        except KeyboardInterrupt:
            typer.echo("interrupted; the same command goes on from here", err=True)
            code = 130
        raise typer.Exit(code)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        found = super().resolve_command(ctx, args)
        processes.check_command(found[0])
        return found


app = typer.Typer(
    cls=Commands, epilog=EPILOG, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)


class Action(StrEnum):
    GET = "get"
    PREPARE = "prepare"
    CHECK = "check"


ProfileName = Annotated[str, typer.Option("--profile", help="smoke, mini, photos, paper, or a path ending in .toml.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE of the run, as in TOML; repeatable.")]
Row = Annotated[str | None, typer.Option(help="A row of the profile, such as voc2007-resnet101-448; see mcar plan.")]
CheckpointProfile = Annotated[
    str | None, typer.Option("--profile", help="As everywhere; if none is named, mini, and paper with --release.")
]
Release = Annotated[
    bool, typer.Option("--release", help="The checkpoint is one of the paper's release; its name says its settings.")
]
ResultsFolder = Annotated[Path | None, typer.Option("--results", help="Where own results go (results/local).")]
DataRoot = Annotated[Path | None, typer.Option("--data-root", help="Where photos are ($MCAR_DATA).")]
Artifacts = Annotated[Path | None, typer.Option("--artifacts", help="Weights, scores, scenes ($MCAR_ARTIFACTS).")]


@app.command()
def reproduce(
    profile: ProfileName = "mini",
    only: Annotated[list[str] | None, typer.Option(help="Notebooks by number; repeatable or 02,03.")] = None,
    results: ResultsFolder = None,
    data_root: DataRoot = None,
) -> None:
    """Run the notebooks, then compare what they computed here with what is committed."""
    from mcar_lib.reproduce import reproduce

    reproduce(profile, only or [], results, data_root)


@app.command()
def publish(profile: ProfileName = "mini") -> None:
    """Make results/local the committed results, and the notebooks show them (for maintainers)."""
    from mcar_lib.reproduce import publish

    publish(profile)


@app.command()
def report(
    check: Annotated[bool, typer.Option("--check", help="Change nothing; exit with 1 if a file differs.")] = False,
) -> None:
    """Rebuild every committed table, figure and README block from the committed run records."""
    from mcar_lib.experiment import project_root
    from mcar_lib.reproduce import drifted, rebuild

    root = project_root()
    if not check:
        rebuild(root)
    elif different := drifted(root):
        raise MCARError("not what the records say; run mcar report:\n" + "\n".join(f"  {name}" for name in different))


@app.command()
def plan(
    profile: ProfileName = "paper",
    throughput: Annotated[
        list[str] | None,
        typer.Option(help="Million million MACs a second, T or BACKBONE=T; repeatable. Adds the hours of each run."),
    ] = None,
) -> None:
    """Print the runs of a profile with what they cost: images, steps, operations, and hours at a given speed."""
    from mcar_lib.config import load_profile
    from mcar_lib.plan import parse_throughput, plan

    speeds = parse_throughput(throughput or [])
    runs = plan(load_profile(profile))
    columns = ["run", "published mAP %", "training images", "test images", "steps", "GMACs an image", "EMACs in all"]
    rows: list[list[object]] = []
    for run in runs:
        hours = run.hours(speeds)
        rows.append(
            [
                run.name,
                "-" if run.published is None else run.published,
                f"{run.train_images:,}",
                f"{run.test_images:,}",
                f"{run.steps:,}",
                run.macs_per_image / 1e9,
                f"{run.macs / 1e18:.3f}",
                *([] if hours is None else [hours]),
            ]
        )
    _print_table([*columns, *(["hours"] if speeds else [])], rows)
    for run in runs:
        typer.echo(run.command)


@app.command()
def train(
    profile: ProfileName = "mini",
    row: Row = None,
    settings: Settings = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Two steps and one test batch; nothing is kept.")] = False,
    results: ResultsFolder = None,
    data_root: DataRoot = None,
    artifacts: Artifacts = None,
) -> None:
    """Train one run, or find it if it was trained before, and print its metrics."""
    from mcar_lib.experiment import project_root

    own = results or project_root() / "results" / "local"
    workspace, config = _open(profile, settings, own, data_root, artifacts, row=row)
    if dry_run:
        for line in workspace.dry_run(config).lines:
            typer.echo(line)
        return
    record = workspace.run(config)
    typer.echo(f"record: {record.path}")
    if record.is_scored:
        _print_metrics(record.metrics["last"])
    else:
        typer.echo(_told_to_submit(profile, row, settings, results, data_root, artifacts))


@app.command()
def evaluate(
    profile: CheckpointProfile = None,
    row: Row = None,
    settings: Settings = None,
    best: Annotated[bool, typer.Option("--best", help="The best epoch on the test set, not the last.")] = False,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights to score on the test split.")] = None,
    release: Release = False,
    results: ResultsFolder = None,
    data_root: DataRoot = None,
    artifacts: Artifacts = None,
) -> None:
    """Print the metrics of a run that was trained before, or of a checkpoint file. Trains nothing.

    With --release, data set, backbone, pooling, size, N and tau are taken from --set, else from the checkpoint's name
    (coco2014-resnet101-gwp-448-4-0.5, of the file or its folder), else from the profile; where from is printed."""
    places = (results, data_root, artifacts)
    workspace, config = _open_checkpoint(checkpoint, release, profile, settings, *places, row=row)
    if checkpoint is not None:
        _print_metrics(_score_checkpoint(workspace, config, checkpoint, release))
        return
    record = _record_of(workspace, config)
    typer.echo(f"record: {record.path}")
    _print_metrics(record.metrics["best" if best else "last"])


@app.command()
def export(
    output: Annotated[Path, typer.Option(help="The .safetensors file to write; its model card goes beside it.")],
    profile: ProfileName = "mini",
    row: Row = None,
    settings: Settings = None,
    results: ResultsFolder = None,
    data_root: DataRoot = None,
    artifacts: Artifacts = None,
) -> None:
    """Write a run's weights as a small fp16 file that mcar_lib.load reads, with a model card."""
    from mcar_lib.released import card_text, export_run

    if output.suffix != ".safetensors":
        raise typer.BadParameter(f"--output {output}: the name must end in .safetensors")
    workspace, config = _open(profile, settings, results, data_root, artifacts, row=row)
    _trained_weights(workspace, config)  # this command trains nothing
    about = export_run(workspace, _record_of(workspace, config), output.resolve()).about
    output.with_suffix(".md").write_text(card_text(output.stem, about), encoding="utf-8")
    size = output.stat().st_size / 1e6
    typer.echo(f"{output}: {size:.1f} MB, mAP {100 * about['mAP']:.1f} % (run: {100 * about['run_mAP']:.1f} %)")


@app.command()
def submit(
    dataset: Annotated[str, typer.Argument(help="voc2012: the one data set whose test labels a server holds.")],
    profile: CheckpointProfile = None,
    row: Row = None,
    settings: Settings = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Weights to score with; else those of the run.")] = None,
    release: Release = False,
    output: Annotated[Path, typer.Option(help="The archive to write.")] = Path("voc2012-test.tar.gz"),
    results: ResultsFolder = None,
    data_root: DataRoot = None,
    artifacts: Artifacts = None,
) -> None:
    """Score the photos of VOC2012 test and write the archive that the PASCAL server takes. Trains nothing."""
    from mcar_lib.data import load_voc
    from mcar_lib.submission import write_voc2012_submission

    if dataset != "voc2012":
        raise typer.BadParameter(f"{dataset!r}: only the test labels of voc2012 are held by a server")
    places = (results, data_root, artifacts)
    # The data set is the command's, whatever the checkpoint was trained on.
    shown = RELEASED[1:]
    workspace, config = _open_checkpoint(checkpoint, release, profile, settings, *places, row=row, shown=shown)
    images = load_voc(workspace.root_of(dataset), "2012", "test", labelled=False)
    weights = checkpoint or _trained_weights(workspace, config)
    mcar, mean_std = _load_weights(config, len(images.classes), weights, release)
    _prepare(workspace, images, workspace.artifacts / "data" / "checked")
    scores = _score(workspace, config, mcar, mean_std, images)
    path = write_voc2012_submission(output, images.ids, images.classes, scores.fused)
    typer.echo(f"{path}: {images.title}, {len(images):,} images, {len(images.classes)} classes")
    if images.is_subset:
        typer.echo(f"the server wants scores of all {images.official_size:,} images")
    typer.echo("upload it, after a login, at http://host.robots.ox.ac.uk:8080: VOC2012, classification, comp2")


@app.command()
def data(
    action: Annotated[Action, typer.Argument(help="check reads all again, whatever prepare left a note of.")],
    name: Annotated[str | None, typer.Argument(metavar="DATASET", help="voc2007, ...: as --dataset.")] = None,
    dataset: Annotated[str | None, typer.Option(help="scenes, voc2007, voc2012, coco2014 or table.")] = None,
    data_root: DataRoot = None,
    settings: Settings = None,
    artifacts: Artifacts = None,
    keep_archives: Annotated[bool, typer.Option("--keep-archives", help="get: keep the archives too.")] = False,
) -> None:
    """get: fetch voc2007, voc2012 or coco2014, going on where a transfer broke. check, prepare: read every image and
    label, print what is in it and what of the published data set is missing; scenes are composed if need be."""
    from mcar_lib.data.download import get_data_set
    from mcar_lib.experiment import Workspace

    if name and dataset and name != dataset:
        raise typer.BadParameter(f"two data sets: {name} and --dataset {dataset}")
    chosen = name or dataset
    if not chosen:
        raise typer.BadParameter(f"which data set? mcar data {action} voc2007, for example")
    workspace = Workspace(data_root=data_root, artifacts=artifacts)
    if action is Action.GET:
        root = workspace.root_of(chosen)
        if get_data_set(chosen, root, keep_archives=keep_archives):
            typer.echo(f"next: mcar data check {chosen} --data-root {root}")
    else:
        notes = workspace.artifacts / "data" / "checked" if action is Action.PREPARE else None
        _check_data(workspace, chosen, parse_settings(settings or []), notes)


def _check_data(workspace: "Workspace", dataset: str, options: Mapping[str, Any], notes: Path | None) -> None:
    from mcar_lib.data import SPLITS
    from mcar_lib.data.published import PUBLISHED, compare_with_published, load_what_is_there

    classes: tuple[str, ...] = ()
    columns, counts = ["class"], []
    for split in SPLITS:
        images = load_what_is_there(dataset, split, workspace.root_of(dataset), **options)
        published = PUBLISHED.get((dataset, split))
        if images is None:
            assert published is not None  # only published data sets are known to have another split
            typer.echo(f"{published.title}: not here, all {published.images:,} published images are missing")
            continue
        fingerprint = _prepare(workspace, images, notes)
        typer.echo(f"{images.title}: {len(images):,} images, fingerprint {fingerprint}")
        for line in compare_with_published(images, published) if published else ():
            typer.echo(f"  {line}")
        classes = images.classes
        if images.labelled:
            columns += [split, f"{split} difficult"]
            counts += [(images.targets == 1).sum(dim=0).tolist(), (images.targets == -1).sum(dim=0).tolist()]
    _print_table(columns, zip(classes, *counts, strict=True))


def _prepare(workspace: "Workspace", images: "ImageSet", notes: Path | None) -> str:
    from mcar_lib.data import prepare
    from mcar_lib.progress import Progress

    with Progress(f"checking {images.title}", len(images)) as progress:
        return prepare(images, notes, progress.update)


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


def _open(
    profile: str,
    settings: Sequence[str] | None,
    results: Path | None,
    data_root: Path | None,
    artifacts: Path | None,
    *,
    row: str | None = None,
) -> tuple["Workspace", "RunConfig"]:
    """The workspace, and the profile's run or row with changes: options of its data set are added to, another's start
    anew."""
    from mcar_lib.config import load_profile
    from mcar_lib.experiment import Workspace

    workspace = Workspace(load_profile(profile), results and results.resolve(), data_root, artifacts)
    run = workspace.profile.row(row) if row else workspace.profile.run
    changes = parse_settings(settings or [])
    known = run.data_options if changes.get("dataset", run.dataset) == run.dataset else {}
    if isinstance(changes.setdefault("data_options", {}), dict):
        changes["data_options"] = {**known, **changes["data_options"]}
    return workspace, run.vary(**changes)


def _open_checkpoint(
    checkpoint: Path | None,
    release: bool,
    profile: str | None,
    settings: Sequence[str] | None,
    results: Path | None,
    data_root: Path | None,
    artifacts: Path | None,
    *,
    row: str | None = None,
    shown: Sequence[str] = RELEASED,
) -> tuple["Workspace", "RunConfig"]:
    """As _open; for a released checkpoint with what its name says and no option does. Prints where values are from."""
    from mcar_lib.checkpoints import release_settings

    places = (results, data_root, artifacts)
    if not release:
        return _open(profile or "mini", settings, *places, row=row)
    if checkpoint is None:
        raise typer.BadParameter("--release needs --checkpoint FILE")
    profile, options, named = profile or "paper", parse_settings(settings or []), release_settings(checkpoint)
    if not named:
        typer.echo(f"{checkpoint}: the name does not say <dataset>-<backbone>-<pooling>-<size>-<N>-<tau>", err=True)
    values = {"precision": "fp32", **named}  # the release scores in float32
    taken = [f"{key}={value}" for key, value in values.items() if key not in options]
    workspace, config = _open(profile, [*taken, *(settings or [])], *places, row=row)
    origins = {"precision": "the release", **dict.fromkeys(named, "the name"), **dict.fromkeys(options, "an option")}
    for key in shown:
        typer.echo(f"{key} = {getattr(config, key)}, from {origins.get(key, f'the profile {profile}')}")
    return workspace, config


def _told_to_submit(profile: str, row: str | None, settings: Sequence[str] | None, *folders: Path | None) -> str:
    """What comes after a run that cannot be scored, with the options that name the same run."""
    from mcar_lib.experiment import NO_TEST_LABELS

    options = ["--profile", profile, *(["--row", row] if row else [])]
    options += [*(part for text in settings or () for part in ("--set", text))]
    for name, folder in zip(("--results", "--data-root", "--artifacts"), folders, strict=True):
        options += [name, str(folder)] if folder else []
    return f"{NO_TEST_LABELS}; next: mcar submit voc2012 {shlex.join(options)}"


def _print_metrics(streams: Mapping[str, Any]) -> None:
    rows = [
        [name, point, *(100 * value for value in (streams[name]["mAP"], *(at[metric] for metric in LABEL_METRICS)))]
        for name in ("global", "local", "fused")
        for point, at in streams[name]["at"].items()
    ]
    _print_table(["stream", "labels at", "mAP %", *LABEL_METRICS], rows)


def _score_checkpoint(workspace: "Workspace", config: "RunConfig", path: Path, release: bool) -> dict[str, Any]:
    """The metrics of weights from a file, in the form that run records have."""
    from mcar_lib.scoring import STREAMS, at_operating_points

    test = _load_split(workspace, config.dataset, "test", config.data_options)
    mcar, mean_std = _load_weights(config, len(test.classes), path, release)
    scores = _score(workspace, config, mcar, mean_std, test)
    found: dict[str, Any] = {}
    for name, stream in zip(STREAMS, (*scores, scores.fused), strict=True):
        at = at_operating_points(stream, test.targets)
        found[name] = {"mAP": at["0.5"]["mAP"], "at": at}
    return found


def _load_weights(config: "RunConfig", num_classes: int, path: Path, release: bool) -> tuple["MCAR", "MeanStd"]:
    from mcar_lib.checkpoints import load_named, load_release_checkpoint
    from mcar_lib.experiment import build_model
    from mcar_lib.weights import read_state_dict

    mcar, mean_std = build_model(config.vary(weights="none"), num_classes)
    if release:
        load_release_checkpoint(path, mcar)
    else:
        load_named(mcar, read_state_dict(path), str(path))
    return mcar, mean_std


def _record_of(workspace: "Workspace", config: "RunConfig") -> "Record":
    record = workspace.find(config)
    if record is None:
        raise ResultsError(f"there is no current record of {config.label}; mcar train with the same options makes one")
    return record


def _trained_weights(workspace: "Workspace", config: "RunConfig") -> Path:
    """The weights file of a run that was trained before."""
    path = workspace.artifacts / "runs" / _record_of(workspace, config).run_id / "model.safetensors"
    if not path.is_file():
        raise WeightsError(f"{path}: the weights of this run are not on this machine; name some with --checkpoint FILE")
    return path


def _score(
    workspace: "Workspace", config: "RunConfig", mcar: "MCAR", mean_std: "MeanStd", images: "ImageSet"
) -> "StreamScores":
    from mcar_lib.training import evaluate

    return evaluate(mcar, workspace.resized(images, config.image_size), mean_std, config.precision, config.seed)


def _load_split(workspace: "Workspace", dataset: str, split: str, options: Mapping[str, Any]) -> "ImageSet":
    from mcar_lib.data import load_image_set

    return load_image_set(dataset, split, workspace.root_of(dataset), **options)


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    plain = not sys.stdout.isatty()
    table = Table(box=None if plain else box.SIMPLE_HEAD, pad_edge=not plain)
    for name in columns:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{cell:.2f}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=160 if plain else None, markup=False, highlight=False).print(table)


def main() -> None:
    """Entry point of the command mcar."""
    app(prog_name="mcar")

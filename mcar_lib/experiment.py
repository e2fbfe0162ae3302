"""From a RunConfig to a run record, once: records are found again by content, and runs that were killed go on.

A run's key is its configuration together with fingerprints of the arithmetic, the data and the starting weights. A
record whose fingerprints are not today's is never taken for the run that is asked for.
"""

import ast
import contextlib
import functools
import hashlib
import json
import os
import tempfile
import time
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file

from mcar_lib import backbones, metrics, model, processes, recipe, regions
from mcar_lib.backbones import Backbone, build_backbone, weights_fingerprint
from mcar_lib.checkpoints import load_named
from mcar_lib.config import Profile, RunConfig, load_profile, make_config
from mcar_lib.data import ImageSet, load_image_set, prepare, scenes_folder, transforms
from mcar_lib.data.published import load_scored_split
from mcar_lib.data.transforms import ResizedImages
from mcar_lib.errors import ConfigError, DataError, ResultsError, WeightsError
from mcar_lib.machine import describe_environment, peak_memory
from mcar_lib.metrics import bootstrap_interval, paired_bootstrap
from mcar_lib.model import MCAR
from mcar_lib.progress import Progress, say
from mcar_lib.recipe import INITIALISATION, MeanStd, StreamScores, sample_generator
from mcar_lib.scoring import STREAMS, cost_of, count_macs, epoch_metrics, metrics_of
from mcar_lib.training import EVALUATION_BATCH, EpochResult, Fit, evaluate, fit, write_atomically

RECORD_FORMAT = 1
ARITHMETIC = (regions, model, backbones, metrics, transforms, recipe)
BASELINE, METHOD = "global baseline", "MCAR"
NO_TEST_LABELS = "VOC2012 test has no public labels, so there is nothing to score"


@functools.cache
def arithmetic_fingerprint() -> str:
    """A hash of what the modules of the method compute: their syntax trees without docstrings and error messages."""
    digest = hashlib.sha256()
    for module in ARITHMETIC:
        digest.update(_source_digest(module))
    return digest.hexdigest()[:16]


def _source_digest(module: types.ModuleType) -> bytes:
    assert module.__file__ is not None
    return _tree_text(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))).encode()


def _tree_text(node: object) -> str:
    """A syntax tree as text that does not depend on the Python version, less raise statements and bare strings."""
    if isinstance(node, ast.Raise) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
        return ""
    if isinstance(node, ast.AST):
        fields = ((name, _tree_text(value)) for name, value in ast.iter_fields(node))
        return f"{type(node).__name__}({','.join(f'{name}={text}' for name, text in fields if text)})"
    if isinstance(node, list):
        return "".join(_tree_text(item) for item in node)
    return "" if node is None else repr(node)


@dataclass(frozen=True)
class Record:
    """A run record as it was read: the path of its JSON file and the content."""

    path: Path
    content: Mapping[str, Any]

    @property
    def run_id(self) -> str:
        return str(self.content["run_id"])

    @functools.cached_property
    def config(self) -> RunConfig:
        try:
            return make_config(self.content["config"])
        except ConfigError as error:
            raise ResultsError(f"{self.path}: {error}; move it away") from error

    @property
    def classes(self) -> list[str]:
        return list(self.content["data"]["classes"])

    @property
    def is_scored(self) -> bool:
        """Whether there are metrics: not where the labels of the test split are not public."""
        return self.content["metrics"] is not None

    @property
    def metrics(self) -> Mapping[str, Any]:
        """ "last" and "best" epoch: the metrics of each stream; raises ResultsError where nothing was scored."""
        if not self.is_scored:
            raise ResultsError(f"{self.path}: no metrics: {NO_TEST_LABELS}; mcar submit voc2012 has its server do it")
        metrics: Mapping[str, Any] = self.content["metrics"]
        return metrics

    def stream(self, name: str = "fused", epoch: str = "last") -> Mapping[str, Any]:
        """The metrics of one stream (global, local, fused) at the last or the best epoch."""
        stream: Mapping[str, Any] = self.metrics[epoch][name]
        return stream

    def map(self, name: str = "fused", epoch: str = "last") -> float:
        return float(self.stream(name, epoch)["mAP"])


@dataclass(frozen=True)
class Scored:
    """One score of each test image and class: a stream of a run, as it was trained or with other values in the test.

    changes: any of num_regions, threshold, selection; none of them changes a weight.
    """

    config: RunConfig
    changes: Mapping[str, int | float | str] = field(default_factory=dict)
    stream: str = "fused"

    @property
    def differs(self) -> dict[str, int | float | str]:
        """The changes that are one: values that the run does not have."""
        return {name: value for name, value in self.changes.items() if getattr(self.config, name) != value}

    def id(self, run_id: str) -> str:
        """Names this score: the run's id where it is the run's own prediction."""
        if not self.differs and self.stream == "fused":
            return run_id
        return content_id({"run": run_id, "changes": self.differs, "stream": self.stream})


def read_records(folder: Path) -> list[Record]:
    """All run records under a profile's results, in name order. Raises ResultsError on a file that is no record."""
    return [_read_record(path, path.stat().st_mtime_ns) for path in sorted((folder / "runs").glob("*.json"))]


@functools.lru_cache(maxsize=1024)
def _read_record(path: Path, changed_ns: int) -> Record:
    record = Record(path, read_json(path))
    if record.content.get("format") != RECORD_FORMAT:
        raise ResultsError(f"{path}: not a run record of format {RECORD_FORMAT}; move it away")
    return record


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises ResultsError if it cannot be read or is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ResultsError(f"{path} holds no JSON object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file whole or not at all; numbers keep all their digits. Raises ResultsError if it cannot."""
    text = json.dumps(content, indent=1, allow_nan=True) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise ResultsError(f"{path} cannot be written ({error.strerror}); choose another --results folder") from error


@dataclass(frozen=True)
class Data:
    """Training and test images of one configuration, checked, with the fingerprints of what was read.

    scored: the test images, or None where their labels are not public.
    """

    train: ImageSet
    scored: ImageSet | None
    train_fingerprint: str
    test_fingerprint: str

    @property
    def test(self) -> ImageSet:
        """The test images; raises DataError where nothing can be scored."""
        if self.scored is None:
            raise DataError(f"{NO_TEST_LABELS}; mcar submit voc2012 writes what its server scores")
        return self.scored


class Workspace:
    """Where one profile's runs are read from and written to.

    results: the folder results/ with the committed records (read only), or results/local, where own runs go.
    A run that the committed records lack is trained into results/local; the two origins never share a folder.
    """

    def __init__(
        self,
        profile: str | Profile = "mini",
        results: Path | str | None = None,
        data_root: Path | str | None = None,
        artifacts: Path | str | None = None,
        verbose: bool = True,
    ) -> None:
        root = project_root()
        self.profile = load_profile(profile) if isinstance(profile, str) else profile
        self.committed = root / "results"
        self.results = self.committed if not results else (root / results).resolve()
        self.local = self.committed / "local" if self.results == self.committed else self.results
        self.artifacts = Path(artifacts or os.environ.get("MCAR_ARTIFACTS") or root / "artifacts").resolve()
        data_root = data_root or os.environ.get("MCAR_DATA")
        self.data_root = Path(data_root).expanduser().resolve() if data_root else None
        self.verbose = verbose
        self._data: dict[str, Data] = {}
        self._resized: dict[tuple[ImageSet, int], ResizedImages] = {}

    @property
    def folder(self) -> Path:
        """The profile's tree among the results that are read first."""
        return self.results / self.profile.name

    @property
    def local_folder(self) -> Path:
        """The profile's tree that new runs are written to."""
        return self.local / self.profile.name

    # Data ------------------------------------------------------------------------------------------------------------

    def data(self, config: RunConfig) -> Data:
        """Both splits of a configuration's data set, every file checked. Scenes are written first if need be."""
        key = json.dumps([config.dataset, config.data_options], sort_keys=True)
        if key not in self._data:
            self._data[key] = processes.main_first(lambda: self._read_data(config))
        return self._data[key]

    def _read_data(self, config: RunConfig) -> Data:
        root = self.root_of(config.dataset)
        if config.dataset == "scenes":
            with Progress("drawing scenes", 1, enabled=self.verbose) as progress:
                scenes_folder(root, progress.update, **config.data_options)
        train = load_image_set(config.dataset, "train", root, **config.data_options)
        test = load_scored_split(config.dataset, root, **config.data_options)
        return Data(train, test, self._prepare(train), "not public" if test is None else self._prepare(test))

    def root_of(self, dataset: str) -> Path:
        """Where a data set lies: scenes among the artifacts, any other below the data root, else DataError."""
        if dataset == "scenes":
            return self.artifacts / "data"
        if self.data_root is None:
            raise DataError(f"{dataset} needs a data root; give --data-root DIR or set MCAR_DATA")
        return self.data_root

    def _prepare(self, images: ImageSet) -> str:
        with Progress(f"checking {images.title}", len(images), enabled=self.verbose) as progress:
            return prepare(images, self.artifacts / "data" / "checked", progress.update)

    def resized(self, images: ImageSet, size: int) -> ResizedImages:
        """The images of a split as squares, read once a session."""
        key = (images, size)
        if key not in self._resized:
            with Progress(f"reading {images.title} at {size} px", len(images), enabled=self.verbose) as progress:
                self._resized[key] = ResizedImages(images, size, progress=progress.update)
        return self._resized[key]

    # Runs ------------------------------------------------------------------------------------------------------------

    def keys(self, config: RunConfig) -> dict[str, str]:
        """Today's fingerprints of everything that a run of this configuration depends on."""
        data = self.data(config)
        return {
            "arithmetic": arithmetic_fingerprint(),
            "train_data": data.train_fingerprint,
            "test_data": data.test_fingerprint,
            "weights": weights_fingerprint(config.backbone, config.weights),
        }

    def known_keys(self, config: RunConfig) -> dict[str, str]:
        """Those fingerprints that can be taken here: without the data or the weights at hand, the others alone."""
        keys = {"arithmetic": arithmetic_fingerprint()}
        with contextlib.suppress(DataError):
            data = self.data(config)
            keys |= {"train_data": data.train_fingerprint, "test_data": data.test_fingerprint}
        with contextlib.suppress(WeightsError):
            keys["weights"] = weights_fingerprint(config.backbone, config.weights)
        return keys

    def find(self, config: RunConfig) -> Record | None:
        """The current record of a configuration: among the results read first, else among the local ones."""
        keys = self.known_keys(config)

        def found() -> Record | None:
            for folder in dict.fromkeys((self.folder, self.local_folder)):
                for record in read_records(folder):
                    if is_current(record, keys) and record.config == config:
                        return record
            return None

        return processes.from_main(found)

    def run(self, config: RunConfig) -> Record:
        """The record of a run, trained first if there is none that is current.

        Several processes train it together: all of them call this and get the record. Raises the errors of data,
        weights and training. Nothing that was there before is lost when it fails.
        """
        processes.check_batch(config.batch_size, config.statistics_batch)
        return self.find(config) or self._train(config)

    def _train(self, config: RunConfig) -> Record:
        processes.from_main(lambda: _check_writable(self.local_folder / "runs"))
        keys = self.keys(config)
        run_id = run_id_of(config, keys)
        folder = self.artifacts / "runs" / run_id
        with _locked(folder):
            found = self.find(config)  # another job may have finished it while this one waited
            if found is not None:
                return found
            if self.verbose:
                say(f"training {config.label} ({run_id})")
            started = time.monotonic()
            trained, state = self._fit(config, folder)
            content = {
                "format": RECORD_FORMAT,
                "run_id": run_id,
                "label": config.label,
                "profile": self.profile.name,
                "config": config.model_dump(mode="json"),
                "keys": keys,
                "data": _describe_data(self.data(config)),
                "metrics": metrics_of(config, state, self.data(config).scored),
                "history": [asdict(result) for result in state.history],
                "cost": cost_of(trained, config, state, time.monotonic() - started),
                "environment": describe_environment(self.profile.threads),
            }
            path = self.local_folder / "runs" / f"{config.label}-{run_id}.json"

            def keep() -> Record:
                write_json(path, content)
                _remove_checkpoints(folder)
                return Record(path, content)

            return processes.from_main(keep)

    def _fit(self, config: RunConfig, folder: Path) -> tuple[MCAR, Fit]:
        data = self.data(config)
        if config.num_regions > len(data.train.classes):
            raise ConfigError(
                f"num_regions is {config.num_regions}; {data.train.title} has {len(data.train.classes)} classes"
            )
        mcar, mean_std = processes.main_first(lambda: build_model(config, len(data.train.classes)))  # may be a download
        train = self.resized(data.train, config.image_size)
        test = None if data.scored is None else self.resized(data.scored, config.image_size)
        with _threads(self.profile.threads):
            state = fit(mcar, train, test, config, mean_std, folder, verbose=self.verbose)
        processes.from_main(lambda: _save_outcome(folder, mcar, state))
        return mcar, state

    def dry_run(self, config: RunConfig) -> "DryRun":
        """Two training steps and one test batch of a run, on its own data and device; nothing is kept.

        Where the test labels are not public, training photos are scored instead.
        """
        data = self.data(config)
        train = data.train.select(range(min(2 * config.batch_size, len(data.train))))
        scored = data.train if data.scored is None else data.scored
        test = scored.select(range(min(EVALUATION_BATCH, len(scored))))
        mcar, mean_std = processes.main_first(lambda: build_model(config, len(train.classes)))
        squares = (ResizedImages(train, config.image_size), ResizedImages(test, config.image_size))
        with tempfile.TemporaryDirectory() as folder, _threads(self.profile.threads):
            state = fit(mcar, *squares, config.vary(epochs=1), mean_std, Path(folder), verbose=False)
        return DryRun(config, len(train), len(test), state.history[0], peak_memory())

    def trained_model(self, config: RunConfig) -> tuple[MCAR, MeanStd]:
        """The model of a run with its last weights, in evaluation mode, and its normalisation. Weights are not
        committed: where they are not on this machine, the run is trained here."""
        folder = self._outcome(config)
        mcar, mean_std = build_model(config.vary(weights="none"), len(self.data(config).train.classes))
        load_named(mcar, load_file(folder / "model.safetensors"), str(folder / "model.safetensors"))
        return mcar.eval(), mean_std

    def scores(self, config: RunConfig, epoch: str = "last") -> StreamScores:
        """Test scores of a run at its last or best epoch; trained here where they are not on this machine."""
        _ = self.data(config).test  # DataError where there is nothing to score
        with np.load(self._outcome(config) / "scores.npz") as stored:
            return StreamScores(*(torch.from_numpy(stored[f"{epoch}_{name}"]) for name in STREAMS[:2]))

    def _outcome(self, config: RunConfig) -> Path:
        self.run(config)
        folder = self.artifacts / "runs" / run_id_of(config, self.keys(config))

        def lacks_weights() -> bool:
            return processes.from_main(lambda: not (folder / "model.safetensors").exists())

        if lacks_weights():
            if self.verbose:
                say(f"the weights of {config.label} are not on this machine; training it")
            with _locked(folder):
                if lacks_weights():  # another job may have finished it meanwhile
                    self._fit(config, folder)
                processes.from_main(lambda: _remove_checkpoints(folder))
        return folder

    # Tests and comparisons -------------------------------------------------------------------------------------------

    def test(self, scored: Scored) -> Mapping[str, Any]:
        """A run's metrics when it is tested with other values than it was trained with; kept as a record of its own."""
        record = self.run(scored.config)
        name = evaluation_id(record.run_id, scored.differs)
        return self.keep("evaluations", name, lambda: self._test(scored, record))

    def _test(self, scored: Scored, record: Record) -> dict[str, Any]:
        scores, seconds = self._scores_with(scored)
        config, test = scored.config.vary(**scored.differs), self.data(scored.config).test
        mcar, _ = build_model(config.vary(weights="none"), len(test.classes))
        return {
            "format": RECORD_FORMAT,
            "run_id": record.run_id,
            "label": scored.config.label,
            "changes": scored.differs,
            "metrics": epoch_metrics(config.epochs, scores, test),
            "cost": {
                "macs_per_image": count_macs(mcar, config.image_size),
                "milliseconds_per_image": 1000 * seconds / len(test),
            },
            "environment": describe_environment(self.profile.threads),
        }

    def _scores_with(self, scored: Scored) -> tuple[StreamScores, float]:
        """Test scores of a run with other values than its own, and the seconds they took; made once and kept."""
        path = self._outcome(scored.config) / f"{evaluation_id('', scored.differs)}.npz"
        if not path.exists():
            config = scored.config.vary(**scored.differs)
            mcar, mean_std = self.trained_model(scored.config)
            mcar.num_regions, mcar.threshold, mcar.selection = config.num_regions, config.threshold, config.selection
            mcar.generator = torch.Generator() if config.selection == "random" else None
            squares, started = self.resized(self.data(config).test, config.image_size), time.monotonic()
            with _threads(self.profile.threads):
                fresh = evaluate(mcar, squares, mean_std, config.precision, config.seed, verbose=self.verbose)
            arrays = {name: stream.numpy() for name, stream in zip(STREAMS[:2], fresh, strict=True)}
            arrays["seconds"] = np.array(time.monotonic() - started)
            write_atomically(path, lambda partial: _save_arrays(partial, arrays))
        with np.load(path) as stored:
            return StreamScores(*(torch.from_numpy(stored[name]) for name in STREAMS[:2])), float(stored["seconds"])

    def _stream_scores(self, scored: Scored, epoch: str) -> torch.Tensor:
        scores = self._scores_with(scored)[0] if scored.differs else self.scores(scored.config, epoch)
        return dict(zip(STREAMS, (*scores, scores.fused), strict=True))[scored.stream]

    def compare(
        self, a: Sequence[RunConfig | Scored], b: Sequence[RunConfig | Scored] = (), epoch: str = "last"
    ) -> Mapping[str, Any]:
        """mAP(a) - mAP(b), each the mean over its runs (seeds), with a paired bootstrap over the test images; with no
        b, mAP(a) itself and its interval. Kept as a record, found again by the runs' ids."""
        groups = [[item if isinstance(item, Scored) else Scored(item) for item in group] for group in (a, b)]
        runs = [[self.run(item.config).run_id for item in group] for group in groups]
        ids = [[item.id(run) for item, run in zip(*pair, strict=True)] for pair in zip(groups, runs, strict=True)]
        resamples = self.profile.bootstrap_resamples
        key = comparison_key(ids[0], ids[1], epoch, resamples)

        def made() -> dict[str, Any]:
            targets = self.data(groups[0][0].config).test.targets
            scores = [torch.stack([self._stream_scores(item, epoch) for item in group]) for group in groups if group]
            result = (
                paired_bootstrap(scores[0], scores[1], targets, resamples)
                if b
                else bootstrap_interval(scores[0], targets, resamples)
            )
            labels = {
                f"{side}_labels": [item.config.label for item in group]
                for side, group in zip("ab", groups, strict=True)
            }
            of_runs = sorted({run for group in runs for run in group})
            return {"format": RECORD_FORMAT, **key, "runs": of_runs, **labels, "confidence": 0.95, **asdict(result)}

        return self.keep("comparisons", content_id(key), made)

    def keep(self, kind: str, name: str, make: Callable[[], dict[str, Any]]) -> Mapping[str, Any]:
        """The content of <profile>/<kind>/<name>.json, made and written to the local results if there is none."""
        found = kept((self.folder, self.local_folder), kind, name)
        if found is not None:
            return found
        content = make()
        write_json(self.local_folder / kind / f"{name}.json", content)
        return content


@dataclass(frozen=True)
class DryRun:
    """What the first steps of a run took: images trained on and tested, their epoch, peak memory in bytes."""

    config: RunConfig
    train_images: int
    test_images: int
    result: EpochResult
    peak_memory_bytes: int

    @property
    def lines(self) -> list[str]:
        """For the reader."""
        steps = -(-self.train_images // self.config.batch_size)
        loss = self.result.global_loss + self.result.local_loss
        return [
            f"{self.config.label}: it runs",
            f"{steps} training steps of {self.config.batch_size} images: {self.result.train_seconds:.2f} s (the first "
            f"steps are slower than the others), loss {loss:.4f}",
            f"one test batch of {self.test_images} images: {self.result.test_seconds:.2f} s",
            f"peak memory: {self.peak_memory_bytes / 2**30:.1f} GiB",
        ]


def kept(folders: Sequence[Path], kind: str, name: str) -> Mapping[str, Any] | None:
    """The content of <kind>/<name>.json in the first of these results/<profile> folders that has it."""
    paths = (folder / kind / f"{name}.json" for folder in folders)
    return next((read_json(path) for path in paths if path.exists()), None)


def main_grid(profile: Profile) -> dict[str, list[RunConfig]]:
    """The main comparison: the global stream alone against MCAR, everything else equal, a run for each seed."""
    return {
        name: [profile.run.vary(local_stream=local_stream, seed=seed) for seed in profile.seeds]
        for name, local_stream in ((BASELINE, False), (METHOD, True))
    }


def evaluation_id(run_id: str, changes: Mapping[str, object]) -> str:
    """What names the record of a test of a run with other values."""
    return content_id({"run": run_id, "changes": changes})


def current_record(records: Sequence[Record], config: RunConfig) -> Record | None:
    """The record of a run among records; raises ResultsError if there is none but one of other arithmetic."""
    current = {"arithmetic": arithmetic_fingerprint()}
    for record in records:
        if is_current(record, current) and record.config == config:
            return record
    for record in records:
        if not is_current(record, current) and record.content.get("label") == config.label:
            raise ResultsError(
                f"{record.path} was made by other arithmetic than today's; run it again: "
                f"mcar reproduce --profile {record.content['profile']}, then mcar publish"
            )
    return None


def comparison_key(a: Sequence[str], b: Sequence[str], epoch: str, num_resamples: int) -> dict[str, Any]:
    """What names a comparison record: the ids of both groups of runs, the epoch, and the bootstrap's resamples."""
    return {"a": list(a), "b": list(b), "epoch": epoch, "num_resamples": num_resamples}


def is_current(record: Record, keys: Mapping[str, str]) -> bool:
    """Whether a record was made by today's arithmetic, data and weights, as far as these keys tell."""
    return all(record.content.get("keys", {}).get(name) == value for name, value in keys.items())


def run_id_of(config: RunConfig, keys: Mapping[str, str]) -> str:
    """A hash of what differs from the defaults (so that a new option renames no run) and its keys."""
    return content_id({"config": config.model_dump(mode="json", exclude_defaults=True), **keys})


def content_id(content: Mapping[str, Any]) -> str:
    """Twelve hex characters of a JSON object's content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def project_root() -> Path:
    """The checkout that holds notebooks/ and results/: above the working folder, else above this file, else here."""
    for folder in (Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parent.parent):
        if (folder / "notebooks").is_dir() and (folder / "results").is_dir():
            return folder
    return Path.cwd()


def build_model(config: RunConfig, num_classes: int) -> tuple[MCAR, MeanStd]:
    """The model of a configuration, its new classifier drawn from the seed, and the backbone's mean and std."""
    seed = sample_generator(config.seed, 0, INITIALISATION).initial_seed()
    torch.manual_seed(seed)  # weights "none" are drawn too
    built: Backbone = build_backbone(config.backbone, config.weights)
    torch.manual_seed(seed)  # the classifier's do not depend on how many numbers the backbone took
    generator = torch.Generator() if config.selection == "random" else None
    mcar = MCAR(
        built.features,
        built.num_features,
        num_classes,
        config.pooling,
        config.num_regions,
        config.threshold,
        config.selection,
        config.local_stream,
        generator,
    )
    return mcar, (built.mean, built.std)


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """That many CPU threads for a while; 0 changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps other jobs from a run's folder; of several processes the main one holds the lock for all."""
    with contextlib.ExitStack() as stack:
        if processes.is_main():
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(folder / "lock"))
        yield


def _check_writable(folder: Path) -> None:
    """Fails before an hour of training, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ResultsError(f"{folder} cannot be written ({error.strerror}); choose another --results folder") from error


def _save_outcome(folder: Path, mcar: MCAR, state: Fit) -> None:
    """Scores of a finished run, if it was scored, and its weights: last, for they tell that all is there."""
    arrays = {
        f"{epoch}_{name}": stream.numpy()
        for epoch, scores in (("last", state.last), ("best", state.best))
        for name, stream in zip(STREAMS[:2], scores or (), strict=False)
    }
    if arrays:
        write_atomically(folder / "scores.npz", lambda path: _save_arrays(path, arrays))
    weights = {key: value.detach().cpu().contiguous() for key, value in mcar.state_dict().items()}
    write_atomically(folder / "model.safetensors", lambda path: save_file(weights, path))


def _remove_checkpoints(folder: Path) -> None:
    """Only once all that a run leaves is safe: until then they spare a run that is killed its epochs."""
    for checkpoint in folder.glob("checkpoint*.pt"):
        checkpoint.unlink()


def _save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with path.open("wb") as stream:  # a path would get .npz appended
        np.savez(stream, **arrays)  # type: ignore[arg-type]


def _describe_data(data: Data) -> dict[str, Any]:
    test = data.scored
    return {
        "train": data.train.title,
        "test": None if test is None else test.title,
        "train_images": len(data.train),
        "test_images": None if test is None else len(test),
        "subset": data.train.is_subset or (test is not None and test.is_subset),
        "classes": list(data.train.classes),
    }

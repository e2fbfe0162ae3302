"""From a RunConfig to a run record, once: records are found again by content, and runs that were killed go on.

A run's keys are fingerprints of the arithmetic, the data and the starting weights. A record whose keys are not today's
is never taken for the run that is asked for. Where there is nothing to look at (no data root was named), its record is
taken, and a line says so; data that was named and cannot be read is an error.
"""

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mcar_lib.backbones import weights_fingerprint
from mcar_lib.errors import ConfigError, DataError, WeightsError
from mcar_lib.files import OTHER_ARTIFACTS, made_folder, project_root, results_folder, user_path, write_json
from mcar_lib.model import MCAR
from mcar_lib.progress import say
from mcar_lib.runs.config import Profile, RunConfig, load_profile
from mcar_lib.runs.environment import PeakMemory
from mcar_lib.runs.fingerprints import accepted
from mcar_lib.runs.memory import told_of_precision, within
from mcar_lib.runs.outcome import Outcome, alone
from mcar_lib.runs.records import RECORD_FORMAT, Record, Value, kept, read_records, run_id_of
from mcar_lib.runs.splits import Data, Splits
from mcar_lib.runs.trainer import arithmetic_fingerprint, cpu_threads, described, load_model, train
from mcar_lib.status import StatusFile
from mcar_lib.training import Execution, StreamScores, evaluate, processes

NO_FILES = ("imagenet", "bundled", "none")  # starting weights that no path names


class Runs:
    """The runs of one profile: where their records are read from and written to, found, trained and tested.

    results: by default, and as "results", the checkout's folder with the committed records (read only); "results/local"
    is the checkout's too, where own runs go; any other path is taken from the working folder. A run that the committed
    records lack is trained into results/local; the two origins never share a folder. artifacts: weights, scores and
    scenes. execution: how runs are carried out; by default as the environment says. Raises ConfigError for an argument
    that cannot be what it should.
    """

    def __init__(
        self,
        profile: str | Profile = "mini",
        results: Path | str | None = None,
        data_root: Path | str | None = None,
        artifacts: Path | str | None = None,
        verbose: bool = True,
        execution: Execution | None = None,
    ) -> None:
        root = project_root()
        self.profile = profile if isinstance(profile, Profile) else load_profile(profile)
        committed = (root / "results").resolve()
        self.results = results_folder(results, root)
        self.local = committed / "local" if self.results == committed else self.results
        self.artifacts = user_path(artifacts or os.environ.get("MCAR_ARTIFACTS") or root / "artifacts").resolve()
        data_root = data_root or os.environ.get("MCAR_DATA")
        place = user_path(data_root).resolve() if data_root else None
        self.execution = execution or Execution.of_environment()
        self.splits = Splits(self.artifacts, place, verbose, self.execution.cache)
        self.verbose = verbose
        self._told: set[str] = set()

    @property
    def folder(self) -> Path:
        """The profile's tree among the results that are read first."""
        return self.results / self.profile.name

    @property
    def local_folder(self) -> Path:
        """The profile's tree that new records are written to."""
        return self.local / self.profile.name

    def data(self, config: RunConfig | None = None) -> Data:
        """Both splits of a configuration's data set, by default the profile's, every file checked."""
        return self.splits.of(config or self.profile.run)

    def keys(self, config: RunConfig) -> dict[str, str]:
        """Today's fingerprints of everything that a run of this configuration depends on."""
        return {
            "arithmetic": arithmetic_fingerprint(),
            **self.data(config).keys,
            "weights": weights_fingerprint(config.backbone, config.weights),
        }

    def find(self, config: RunConfig, look: bool = True) -> Record | None:
        """The current record of a configuration: among the results read first, else among the local ones.

        Says once what it was taken without a look at. Raises the errors of a data root or of a weights file that was
        named and cannot be read. look: False where no result of the run is shown, only its weights are used.
        """
        keys, unseen = self.look(config) if look else ({"arithmetic": arithmetic_fingerprint()}, [])

        def found() -> Record | None:
            records = (record for folder in self._folders() for record in read_records(folder))
            record = next((each for each in records if each.is_current(keys) and each.config == config), None)
            if record is not None:
                self._place(record.run_id).remove_leftovers()
            return record

        record = processes.broadcast_from_main(found)
        if record is not None:
            self._tell_once(*unseen, *_told_of_processes(record))
        return record

    def _tell_once(self, *lines: str) -> None:
        for line in dict.fromkeys(lines):
            if self.verbose and line not in self._told:
                say(line)
            self._told.add(line)

    def look(self, config: RunConfig) -> tuple[dict[str, str], list[str]]:
        """Today's fingerprints of what is here of all that a run depends on, and a line for each thing that is not.

        Raises DataError or WeightsError where a data root or a weights file was named and cannot be read.
        """
        keys, unseen = {"arithmetic": arithmetic_fingerprint()}, []
        try:
            processes.main_first(lambda: self.splits.place_of(config))
        except DataError as error:
            why = error if config.dataset == "scenes" else f"{config.dataset}: no data root was named that holds it"
            unseen.append(f"{why}; its records are shown without a look at the data")
        else:
            keys |= self.data(config).keys
        try:
            keys["weights"] = weights_fingerprint(config.backbone, config.weights)
        except WeightsError as error:
            if config.weights not in NO_FILES:
                raise
            unseen.append(f"{error}; records are shown without a look at the starting weights")
        return keys, unseen

    def run(self, config: RunConfig) -> Record:
        """The record of a run, trained first if there is none that is current.

        Several processes train it together: all of them call this and get the record. Raises the errors of data,
        weights and training. Nothing that was there before is lost when it fails.
        """
        processes.check_batch(config.batch_size, config.statistics_batch)
        return self.find(config) or self._train(config)

    def _train(self, config: RunConfig) -> Record:
        processes.broadcast_from_main(self._check_places)
        keys = self.keys(config)
        run_id = run_id_of(config, keys)
        outcome, status = self._place(run_id), self._status(run_id)
        with outcome.locked(), contextlib.ExitStack() as followed:
            if found := self.find(config):  # another job may have finished it while this one waited
                return found
            followed.enter_context(status.following(config.label, run_id, self.profile.name))
            if self.verbose:
                say(f"training {config.label} ({run_id})")
            execution = processes.broadcast_from_main(lambda: self._within_memory(config))
            started, memory, threads = time.monotonic(), PeakMemory(), self.profile.threads
            mcar, state = train(self.splits, config, outcome, threads, execution, status.tell)
            names = {"format": RECORD_FORMAT, "run_id": run_id, "label": config.label, "profile": self.profile.name}
            seconds = time.monotonic() - started
            measured = described(config, self.data(config), mcar, state, seconds, memory, threads)
            record = Record(
                self.local_folder / "runs" / f"{config.label}-{run_id}.json", {**names, "keys": keys, **measured}
            )

            def keep() -> Record:
                write_json(record.path, record.content)
                outcome.remove_checkpoints()
                status.finished(record.path, record.map() if record.is_scored else None)
                return record

            return processes.broadcast_from_main(keep)

    def _within_memory(self, config: RunConfig) -> Execution:
        """How the run is carried out in the memory that there is for it; says what is to be said of that."""
        with contextlib.suppress(RuntimeError, NotImplementedError):  # tensors without content cannot do everything
            execution, lines = within(config, self.data(config).num_images, self.execution)
            self._tell_once(*lines, *told_of_precision(config))
            return execution
        return self.execution

    def _check_places(self) -> None:
        made_folder(self.local_folder / "runs")
        made_folder(self.artifacts / "runs", OTHER_ARTIFACTS)

    # What a run leaves on this machine ------------------------------------------------------------------------------

    def outcome(self, config: RunConfig, keys: Mapping[str, str] | None = None) -> Outcome:
        """The place of a run's weights and scores; whether they are there is another question. What former arithmetic
        of the same numbers has left is as good as today's. keys: today's, where its data is not to be read for them."""
        keys = keys or self.keys(config)
        former = ({**keys, "arithmetic": each} for each in accepted(keys["arithmetic"]))
        places = [self._place(run_id_of(config, each)) for each in former]
        return next((place for place in places if place.is_here()), None) or next(
            (place for place in places if place.has_scores()), places[0]
        )

    def _place(self, run_id: str) -> Outcome:
        return Outcome(self.artifacts / "runs" / run_id)

    def _status(self, run_id: str) -> StatusFile:
        return StatusFile(self.artifacts / "runs" / run_id, writes=processes.is_main())

    def mark_waiting(self, config: RunConfig, job: str = "") -> StatusFile:
        """Says in its status that this session, or that job of a cluster, is going to train a run. Raises the errors of
        its data and weights."""
        run_id = run_id_of(config, self.keys(config))
        status = self._status(run_id)
        status.waiting(config.label, run_id, self.profile.name, job)
        return status

    def trained(self, config: RunConfig) -> Outcome:
        """A run's weights and scores. They are not committed: where they are not on this machine, it is trained."""
        self.run(config)
        outcome = self.outcome(config)
        if not outcome.is_here():
            processes.broadcast_from_main(lambda: made_folder(self.artifacts / "runs", OTHER_ARTIFACTS))
            if self.verbose:
                say(f"the weights of {config.label} are not on this machine; training it")
            with outcome.locked():
                if not outcome.is_here():  # another job may have finished it meanwhile
                    self._train_again(config, outcome)
        return outcome

    def _train_again(self, config: RunConfig, outcome: Outcome) -> None:
        status = self._status(outcome.folder.name)
        with status.following(config.label, outcome.folder.name, self.profile.name):
            train(self.splits, config, outcome, self.profile.threads, self.execution, status.tell)
            processes.broadcast_from_main(outcome.remove_checkpoints)
            record = self.run(config)
            status.finished(record.path, record.map() if record.is_scored else None)

    def trained_model(self, config: RunConfig, **changes: Value) -> MCAR:
        """The model of a run with its last weights, in evaluation mode; changes: num_regions, threshold, selection."""
        weights = self.trained(config).weights
        return load_model(config.vary(**changes), len(self.data(config).train.classes), weights).eval()

    def scores(self, config: RunConfig, epoch: str = "last") -> StreamScores:
        """Test scores of a run at its last or best epoch; where they are not on this machine, its weights are scored,
        or it is trained.

        Raises DataError where there is nothing to score.
        """
        shape = tuple(self.data(config).test.targets.shape)
        self.run(config)
        if (found := self.outcome(config).scores(epoch, shape)) is not None:
            return found
        outcome = self.trained(config)
        last_is_best = self.run(config).metrics["best"]["epoch"] == config.epochs
        with outcome.locked():
            if outcome.scores(epoch, shape) is None:  # another job may have made them meanwhile
                if epoch == "best" and not last_is_best:  # the weights are those of the last epoch
                    say(f"the scores of the best epoch of {config.label} are not on this machine; training it")
                    self._train_again(config, outcome)
                else:
                    say(f"the scores of {config.label} are not on this machine; scoring its weights")
                    mcar = load_model(config, shape[1], outcome.weights).eval()
                    last = self.evaluated(config, mcar)
                    outcome.save_scores(last, last if last_is_best else None)
            found = outcome.scores(epoch, shape)
        assert found is not None
        return found

    def evaluated(self, config: RunConfig, mcar: MCAR) -> StreamScores:
        """Scores that a model has on a run's test images, computed as the run's own were."""
        squares = self.splits.squares(self.data(config).test, config.image_size)
        with cpu_threads(self.profile.threads):
            return evaluate(mcar, squares, config.precision, config.seed, self.verbose, self.execution)

    # Records that follow from runs ----------------------------------------------------------------------------------

    def keep(
        self, kind: str, name: str, made_by: str, make: Callable[[], dict[str, Any]], **keys: str
    ) -> Mapping[str, Any]:
        """The content of <profile>/<kind>/<name>.json, made and written to the local results if there is none that
        the definitions of the fingerprint made_by have made from what the keys tell. Of several sessions that ask at
        once, one makes it."""
        found = kept(self._folders(), kind, name, made_by, keys)
        if found is None:
            lock = self.artifacts / "locks" / f"{self.profile.name}-{kind}-{name}.lock"
            with alone(lock, f"makes {kind}/{name}.json"):
                found = kept(self._folders(), kind, name, made_by, keys)  # another job may have made it meanwhile
                if found is None:
                    found = {**make(), **keys, "made_by": made_by}
                    write_json(self.local_folder / kind / f"{name}.json", found)
        return found

    def _folders(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys((self.folder, self.local_folder)))


def open_runs(profiles: Sequence[str], results: Path | str | None = None, data_root: str | None = None) -> list[Runs]:
    """The runs of several profiles that are shown together.

    One data root seldom holds the data of all: where it has nothing of a profile's, but something of another's, that
    profile's records are shown as without a data root.
    """
    if not isinstance(profiles, list | tuple):
        raise ConfigError(f'profiles is {profiles!r}; give a list of names, ["mini"] for one')
    opened = [Runs(profile, results, data_root) for profile in profiles]
    elsewhere = [runs for runs in opened if not runs.splits.holds_any_of(runs.profile.run)]
    if len(elsewhere) < len(opened):
        for runs in elsewhere:
            runs.splits.data_root = None
    return opened


def _told_of_processes(record: Record) -> list[str]:
    """What to know of a record that was trained by another number of processes than there are now."""
    count, config = record.num_processes, record.config
    if count == processes.num_processes() or config.statistics_batch:
        return []
    by, share = "one process" if count == 1 else f"{count} processes", config.batch_size // count
    return [
        f"{config.label} was trained by {by}, so with batch statistics over {share} images each; with "
        f"statistics_batch={share} their number makes no difference"
    ]

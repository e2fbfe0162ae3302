"""What one run is (RunConfig) and what a profile file says (Profile), checked before anything is read or trained."""

import difflib
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mcar_lib import backbones
from mcar_lib.data import DATA_SETS, ScoredOn
from mcar_lib.errors import ConfigError, NotInProfileError
from mcar_lib.files import reading, user_path
from mcar_lib.model import Look, Pooling, check_image_size
from mcar_lib.regions import BoxSource, Selection, check_threshold
from mcar_lib.training import Recipe
from mcar_lib.training.recipe import Positive

BASELINE, METHOD = "global baseline", "MCAR"
Model = TypeVar("Model", bound=BaseModel)
# What readers of the paper, and of other training scripts, call a key.
OTHER_NAMES = {
    **{"N": "num_regions", "topN": "num_regions", "tau": "threshold", "model": "backbone", "arch": "backbone"},
    **{"img_size": "image_size", "bs": "batch_size", "wd": "weight_decay", "amp": "precision", "ema": "average_decay"},
}
# pydantic's kinds of a wrong type -> what is wanted, as TOML writes it.
WANTED = {
    **dict.fromkeys(("int_type", "int_from_float"), "a whole number"),
    **{"float_type": "a number", "bool_type": "true or false", "string_type": "a text"},
    **{"tuple_type": "a list, as in [30, 50]", "dict_type": "a table, as in { side = 96 }"},
}
KINDS = ("int", "float", "str", "bool", "tuple[str, ...]")  # pydantic puts them behind a key that takes several kinds
MOST_SHOWN = 60  # characters of a wrong value


class RunConfig(Recipe):
    """One run: a data set, a model and how it is trained. Unknown keys, wrong types, impossible values are errors.

    scored_on: "test" is the published protocol; "val" trains on the train list and scores the val list, to choose
    values there. box_source: see mcar_lib.regions.
    """

    dataset: str = "scenes"
    data_options: dict[str, int | str | tuple[str, ...]] = Field(default_factory=dict)
    backbone: str = "mobilenet_v2"
    weights: str = "imagenet"
    pooling: Pooling = "avg"
    image_size: int = 448
    num_regions: Annotated[int, Field(ge=1)] = 4
    threshold: float = 0.5
    selection: Selection = "top"
    box_source: BoxSource = "maps"
    local_stream: bool = True
    scored_on: ScoredOn = "test"

    @field_validator("dataset")
    @classmethod
    def _known_dataset(cls, name: str) -> str:
        if name not in DATA_SETS:
            raise ValueError(f"unknown data set; choose one of {', '.join(DATA_SETS)}")
        return name

    @field_validator("backbone")
    @classmethod
    def _known_backbone(cls, name: str) -> str:
        if not name.startswith("timm:"):
            backbones.lookup(name)
        return name

    @field_validator("image_size")
    @classmethod
    def _multiple_of_stride(cls, size: int) -> int:
        check_image_size((size,))
        return size

    @field_validator("threshold")
    @classmethod
    def _inside_the_range_of_marginals(cls, threshold: float) -> float:
        check_threshold(threshold)
        return threshold

    def vary(self, **changes: object) -> "RunConfig":
        """A copy with some values changed, checked like any other."""
        return make_config({**self.model_dump(mode="json"), **changes})

    @property
    def model(self) -> str:
        """Which of the two models that the main comparison holds against each other."""
        return METHOD if self.local_stream else BASELINE

    @property
    def label(self) -> str:
        """A short readable name, unique together with the run id."""
        parts = [
            self.dataset,
            self.backbone.replace(":", "-").replace("/", "-"),
            f"{self.image_size}px",
            self.pooling,
        ]
        if self.local_stream:
            parts += [f"N{self.num_regions}"]
            parts += [f"tau{self.threshold:g}"] if self.threshold != 0.5 else []
            parts += [self.selection] if self.selection != "top" else []
            parts += [self.box_source.replace(" ", "-")] if self.box_source != "maps" else []
        else:
            parts += ["global"]
        parts += [f"crop{self.crop_area:g}"] if self.crop_area < 1 else []
        parts += [self.scored_on] if self.scored_on != "test" else []
        return "-".join([*parts, f"s{self.seed}"])


AxisName = Literal["pooling", "image_size", "backbone", "num_regions", "selection", "threshold"]
Value = int | float | str | bool


class Axis(BaseModel):
    """One axis of the ablations: its values, the seeds of its runs, and what it changes in [run] to stay in its budget.

    tested_only: the values are tried in the test of one model, none is trained with.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    values: Annotated[tuple[Value, ...], Field(min_length=1)]
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)
    change: dict[str, Value] = Field(default_factory=dict)
    tested_only: bool = False


class Tuning(BaseModel):
    """How the learning rate of each arm is chosen: one run a rate, trained on train and scored on val.

    seed: of these runs, none of the report's. widenings: how often the grid may grow by a factor of two on a side where
    the best rate is its last.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    rates: Annotated[tuple[Positive, ...], Field(min_length=2)]
    seed: Annotated[int, Field(ge=0)]
    widenings: Annotated[int, Field(ge=0)] = 3

    @field_validator("rates")
    @classmethod
    def _ascend(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if list(rates) != sorted(set(rates)):
            raise ValueError(f"rates must ascend, not {rates}")
        return rates


def arm_of(config: RunConfig, tuning: Tuning) -> RunConfig:
    """The run that a configuration's rate is chosen with. Runs that differ in nothing that changes which rate is right
    share it: seed, which classes or whose boxes are looked at, tau."""
    shared = {"selection": "top", "box_source": "maps", "threshold": 0.5, "learning_rate": tuning.rates[0]}
    return config.vary(seed=tuning.seed, scored_on="val", **shared)


class EqualCost(BaseModel):
    """What MCAR's extra computing buys without regions: image_size, the input at which one pass of the global stream
    costs what MCAR costs; crop_area, of random resized crops; seeds, of these runs."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    image_size: int
    crop_area: Annotated[float, Field(gt=0, lt=1)]
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0,)


class Cheaper(BaseModel):
    """Values of a cheaper look at the regions (mcar_lib.model.Look), each tried by itself: floors, shares, and local
    sizes in pixels. Where the profile has no tuning, whose run would choose, the first of each is taken."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    floors: Annotated[tuple[float, ...], Field(min_length=1)]
    shares: Annotated[tuple[float, ...], Field(min_length=1)]
    local_sizes: Annotated[tuple[int, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _are_looks(self) -> "Cheaper":
        try:
            for floor in self.floors:
                Look(floor=floor)
            for share in self.shares:
                Look(share=share)
            for size in self.local_sizes:
                Look(local_size=size)
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return self


class Profile(BaseModel):
    """What one profile file says: the run that its notebooks vary, the seeds, the bootstrap's resamples.

    tuning, equal_cost, cheaper: None where the profile's rates are fixed, and where these runs or tests are not made.
    rows: runs with names of their own, as what each changes in [run]: the rows of a published table.
    threads: of one run on a CPU, 0 for all. Sums depend on it in their last bits, so it is part of the profile, not of
    the machine; cores that one run leaves free train others of the same grid.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, Field(max_length=100)]
    title: str
    seeds: tuple[int, ...]
    bootstrap_resamples: Annotated[int, Field(ge=2)]
    threads: Annotated[int, Field(ge=0)] = 0
    run: RunConfig
    tuning: Tuning | None = None
    equal_cost: EqualCost | None = None
    cheaper: Cheaper | None = None
    ablations: dict[AxisName, Axis] = Field(default_factory=dict)
    rows: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _name_of_a_folder(cls, name: str) -> str:
        """Results lie in a folder of this name, so it must not lead elsewhere, or into one that has another use."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) or name.lower() in ("local", "published"):
            raise ValueError(f"{name!r}: use letters, digits, - and _, and neither local nor published")
        return name

    @model_validator(mode="after")
    def _axes_are_runs(self) -> "Profile":
        """Every run of an axis is one that can be, and the run that the others are held against is among them."""
        for name, axis in self.ablations.items():
            try:
                base = self.run.vary(**axis.change)
                for value in axis.values:
                    base.vary(**{name: value})
            except ConfigError as error:
                raise ValueError(f"ablations.{name}: {error}") from error
            if getattr(base, name) not in axis.values:
                raise ValueError(f"ablations.{name}: {getattr(base, name)!r}, the run's own value, is not among them")
        return self

    @model_validator(mode="after")
    def _rows_are_runs(self) -> "Profile":
        for name in self.rows:
            try:
                self.row(name)
            except ConfigError as error:
                raise ValueError(f"rows.{name}: {error}") from error
        return self

    def base(self, axis: AxisName) -> RunConfig:
        """The run that an axis of the ablations varies; raises NotInProfileError where the profile has none."""
        return self.run.vary(**self.axis(axis).change)

    def axis(self, name: AxisName) -> Axis:
        """The values of an axis of the ablations; raises NotInProfileError where the profile has none."""
        if name not in self.ablations:
            there = ", ".join(self.ablations) or "none"
            raise NotInProfileError(f"profile {self.name} has no [ablations] for {name}; it has {there}")
        return self.ablations[name]

    def equal_cost_arms(self) -> dict[str, RunConfig]:
        """The global stream with MCAR's computing, and controls of its regions, by name; none without equal_cost."""
        if self.equal_cost is None:
            return {}
        alone, both = self.run.vary(local_stream=False), self.run.vary(local_stream=True)
        longer, crop = alone.epochs * (1 + alone.num_regions), self.equal_cost.crop_area
        return {
            f"global, {longer} epochs": alone.vary(epochs=longer),
            f"global, {self.equal_cost.image_size} px": alone.vary(image_size=self.equal_cost.image_size),
            "global, random crops": alone.vary(crop_area=crop),
            f"global, random crops, {longer} epochs": alone.vary(crop_area=crop, epochs=longer),
            "MCAR, boxes of another photo": both.vary(box_source="other photo"),
        }

    def cheaper_values(self) -> Cheaper:
        """The values of a cheaper look; raises NotInProfileError where the profile has none."""
        if self.cheaper is None:
            raise NotInProfileError(f"profile {self.name} has no [cheaper]")
        return self.cheaper

    def row(self, name: str) -> RunConfig:
        """The run of a row; raises ConfigError for a name that is none."""
        if name not in self.rows:
            raise ConfigError(f"profile {self.name} has no row {name!r}; it has {', '.join(self.rows) or 'none'}")
        return self.run.vary(**self.rows[name])


def make_config(values: Mapping[str, object]) -> RunConfig:
    """A RunConfig from plain values; raises ConfigError that lists every wrong key and why."""
    return _validated(RunConfig, values, "run configuration")


def load_profile(name_or_path: str) -> Profile:
    """A profile by name (smoke, mini, photos, paper) or from a TOML file of one's own.

    Raises ConfigError for an unknown name, broken TOML, an unknown key or a value of the wrong type or range.
    """
    folder = Path(__file__).parent.parent / "profiles"
    names = ", ".join(sorted(known.stem for known in folder.glob("*.toml")))
    if not isinstance(name_or_path, str):
        raise ConfigError(f"profile {name_or_path!r}: a profile is named by a text; choose one of {names}")
    path = user_path(name_or_path) if name_or_path.endswith(".toml") else folder / f"{name_or_path}.toml"
    if not path.exists():
        there = "no such file" if name_or_path.endswith(".toml") else "no such profile"
        raise ConfigError(f"{name_or_path!r}: {there}; choose one of {names}, or give a path that ends in .toml")
    with reading(path, "valid TOML", ConfigError):
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    return _validated(Profile, values, str(path))


def _validated(kind: type[Model], values: Mapping[str, object], where: str) -> Model:
    try:
        return kind.model_validate_json(json.dumps(values))  # JSON mode: a list may stand for a tuple
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_told(kind, error))) from error
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error


def _told(kind: type[BaseModel], error: ValidationError) -> list[str]:
    """pydantic's findings as sentences: the key, what is wrong, and what may stand there."""
    told: dict[str, str] = {}
    for part in error.errors():
        found, given = part["type"], _shown(part["input"])
        path = [each for each in part["loc"] if found not in WANTED or each not in KINDS]
        key = ".".join(map(str, path))
        if found in WANTED and key in told:  # a key that takes several kinds
            told[key] = told[key].replace(", not ", f" or {WANTED[found]}, not ", 1)
        elif found in WANTED:
            told[key] = f"give {WANTED[found]}, not {given}"
        elif found == "extra_forbidden":
            told[key] = f"no such key; {known_keys(str(path[-1]), _keys_at(kind, path[:-1]))}"
        elif found == "missing":
            told[key] = "this key is missing"
        elif found == "value_error":  # our own sentence, which names the value where that helps
            told[key] = part["msg"].removeprefix("Value error, ")
        else:
            told[key] = f"{part['msg']}, not {given}"
    return [f"{key}: {sentence}" if key else sentence for key, sentence in told.items()]


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def known_keys(name: str, known: Sequence[str]) -> str:
    """What to say of a key that is none: those that are meant most likely, and all there are."""
    near = difflib.get_close_matches(name.lower(), known, n=2)
    near += [key for key in known if name.lower() in ("".join(word[0] for word in key.split("_")), *key.split("_"))]
    near = list(dict.fromkeys([OTHER_NAMES[name]] if OTHER_NAMES.get(name) in known else near))
    there = ", ".join(known)
    return f"did you mean {' or '.join(near)}? There are {there}" if near else f"there are {there}"


def _keys_at(kind: type[BaseModel], path: Sequence[object]) -> list[str]:
    """The keys of the table at a path of a file: ("run",) of a profile -> those of RunConfig."""
    for part in path:
        field = kind.model_fields.get(str(part))  # none for a name that the file gives: an axis, say
        kind = (_model_in(field.annotation) if field else None) or kind
    return list(kind.model_fields)


def _model_in(annotation: object) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for each in get_args(annotation) if (found := _model_in(each))), None)

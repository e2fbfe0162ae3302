"""From run records to everything that a reader sees: tables, figures, the claims table, the README's number blocks.

Nothing here trains or measures. A record that was not made by today's arithmetic is an error, not a row.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
import torch

from mcar_lib import plots
from mcar_lib.ablations import NO_DIFFERENCE, StudyResult, difference_rows, load_study, studies, study_table
from mcar_lib.ablations import interval_text as interval_text
from mcar_lib.attention import FOUND, load_regions, overlap_table, pointing_table, upsampled
from mcar_lib.config import Profile
from mcar_lib.data import read_image
from mcar_lib.data.transforms import resize_square
from mcar_lib.errors import ResultsError
from mcar_lib.experiment import (
    BASELINE,
    METHOD,
    Record,
    Workspace,
    comparison_key,
    content_id,
    current_record,
    kept,
    main_grid,
    project_root,
    read_records,
)
from mcar_lib.released import ReleasedModel
from mcar_lib.scoring import OPERATING_POINTS
from mcar_lib.training import write_atomically

# A rerun elsewhere differs in the last bit of every sum, and training enlarges that. Of the six mini runs of the main
# comparison on a CPU with AVX2 and on one with AVX-512, the two furthest apart differed by 0.044 in mAP.
TOLERANCE = 0.06


@dataclass(frozen=True)
class MainResult:
    """The runs of the main comparison, its paired interval, and where they are from."""

    profile: Profile
    runs: Mapping[str, Sequence[Record]]  # "global baseline" and "MCAR", a record a seed
    comparison: Mapping[str, Any]

    @property
    def records(self) -> list[Record]:
        return [record for group in self.runs.values() for record in group]

    @property
    def data(self) -> Mapping[str, Any]:
        data: Mapping[str, Any] = self.records[0].content["data"]
        return data

    @property
    def title(self) -> str:
        caution = ", not comparable with the published figures" if self.data["subset"] else ""  # it names the subset
        return f"{self.profile.title}: {self.data['test']}{caution}"


def load_main_result(folder: Path, profile: Profile) -> MainResult | None:
    """The main comparison from one results/<profile> folder; None where its runs are not all there.

    Raises ResultsError when a record of it was made by other arithmetic than today's.
    """
    records = read_records(folder)
    runs = {name: [current_record(records, config) for config in grid] for name, grid in main_grid(profile).items()}
    if any(record is None for group in runs.values() for record in group):
        return None
    found = {name: [record for record in group if record is not None] for name, group in runs.items()}
    ids = {name: [record.run_id for record in group] for name, group in found.items()}
    key = comparison_key(ids[METHOD], ids[BASELINE], "last", profile.bootstrap_resamples)
    comparison = kept([folder], "comparisons", content_id(key))
    return None if comparison is None else MainResult(profile, found, comparison)


# Tables --------------------------------------------------------------------------------------------------------------


def runs_table(result: MainResult) -> pd.DataFrame:
    """One row a run: model, seed, mAP of each stream (percent, last epoch), the best epoch's, and the seconds."""
    rows = []
    for name, group in result.runs.items():
        for record in group:
            best = record.metrics["best"]
            rows.append(
                {
                    "model": name,
                    "seed": record.config.seed,
                    "mAP": 100 * record.map(),
                    "global": 100 * record.map("global"),
                    "local": 100 * record.map("local") if record.config.local_stream else None,
                    "best epoch": best["epoch"],
                    "best mAP": 100 * best["fused"]["mAP"],
                    "train seconds": record.content["cost"]["train_seconds"],
                    "run": record.run_id,
                }
            )
    return pd.DataFrame(rows)


def main_table(result: MainResult, epoch: str = "last") -> pd.DataFrame:
    """One row a model: mAP and, at each operating point, CP to OF1; percent, mean over the seeds of fused scores."""
    rows = []
    for name, group in result.runs.items():
        streams = [record.stream("fused", epoch) for record in group]
        values = pd.Series([100 * stream["mAP"] for stream in streams])
        row: dict[str, Any] = {"model": name, "seeds": len(group), "mAP": values.mean()}
        row["mAP range"] = f"{values.min():.1f} to {values.max():.1f}"
        for point in OPERATING_POINTS:
            for metric in ("CF1", "OF1"):
                row[f"{metric} at {point}"] = 100 * fmean(stream["at"][point][metric] for stream in streams)
        rows.append(row)
    return pd.DataFrame(rows)


def operating_table(result: MainResult) -> pd.DataFrame:
    """All six label metrics of both models at every operating point; percent, mean over seeds."""
    rows = []
    for point in OPERATING_POINTS:
        for name, group in result.runs.items():
            at = [record.stream()["at"][point] for record in group]
            metrics = {metric: 100 * fmean(values[metric] for values in at) for metric in at[0]}
            rows.append({"predicted at": point, "model": name, **metrics})
    return pd.DataFrame(rows)


def per_class_table(result: MainResult) -> pd.DataFrame:
    """AP of each class for both models and their difference; percent, mean over seeds."""
    columns = {
        name: 100 * pd.DataFrame([record.stream()["AP"] for record in group], columns=result.data["classes"]).mean()
        for name, group in result.runs.items()
    }
    table = pd.DataFrame(columns)
    table["difference"] = table[METHOD] - table[BASELINE]
    table.index.name = "class"
    return table


def difference_table(result: MainResult) -> pd.DataFrame:
    """MCAR minus its global baseline: mAP in points, the paired 95 % interval, and what follows."""
    found = result.comparison
    return pd.DataFrame(
        [
            {
                "compared": f"{METHOD} - {BASELINE}",
                "difference": 100 * found["difference"],
                "low": 100 * found["low"],
                "high": 100 * found["high"],
                "p": found["p_value"],
                "finding": finding(found),
            }
        ]
    )


def finding(comparison: Mapping[str, Any]) -> str:
    """The sentence that a paired interval supports."""
    if comparison["low"] > 0:
        return "MCAR is better"
    return "the global baseline is better" if comparison["high"] < 0 else NO_DIFFERENCE


def cost_table(result: MainResult) -> pd.DataFrame:
    """Parameters, operations and measured seconds of both models."""
    rows = []
    for name, group in result.runs.items():
        costs = [record.content["cost"] for record in group]
        images = group[0].config.epochs * result.data["train_images"]
        rows.append(
            {
                "model": name,
                "parameters": costs[0]["parameters"],
                "over the backbone": costs[0]["parameters_over_backbone"],
                "GMACs an image": costs[0]["macs_per_image"] / 1e9,
                "training images/s": images / fmean(cost["train_seconds"] for cost in costs),
                "training minutes": fmean(cost["train_seconds"] for cost in costs) / 60,
            }
        )
    return pd.DataFrame(rows)


def published_beside_ours(result: MainResult) -> pd.DataFrame:
    """The published mAP (percent, "-" where nothing was published) with ours where data, backbone and size agree."""
    return _published_with([(result.runs[METHOD][0], fmean(record.map() for record in result.runs[METHOD]))])


def published_table(result: StudyResult) -> pd.DataFrame:
    """As published_beside_ours, for the MCAR runs of an ablation."""
    outcomes = [outcome for outcome in result.outcomes if outcome.records and outcome.setting.model == METHOD]
    return _published_with([(o.records[0], fmean(metrics["mAP"] for metrics in o.metrics)) for o in outcomes])


def _published_with(ours: Sequence[tuple[Record, float]]) -> pd.DataFrame:
    rows = []
    for (backbone, size), cells in read_published("map.csv").groupby(["backbone", "image_size"], sort=False):
        by_dataset = {cell.dataset: f"{cell.percent}" for cell in cells.itertuples()}
        same = [
            f"{100 * value:.1f}"
            for record, value in ours
            if (record.config.backbone, record.config.image_size) == (backbone, size)
            and record.config.dataset in by_dataset
            and not record.content["data"]["subset"]
        ]
        row = {"backbone": backbone, "input": size}
        row |= {dataset: by_dataset.get(dataset, "-") for dataset in ("voc2007", "voc2012", "coco2014")}
        rows.append({**row, "ours": ", ".join(same) or "not run"})
    return pd.DataFrame(rows)


def read_published(name: str, text: bool = False) -> pd.DataFrame:
    """One of the tables of results/published, each row with its source; text: every column as strings, none missing."""
    path = project_root() / "results" / "published" / name
    return pd.read_csv(path, dtype=str, keep_default_na=False) if text else pd.read_csv(path)


# Files ---------------------------------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[MainResult], pd.DataFrame]] = {
    "main_results": main_table,
    "main_results_best_epoch": partial(main_table, epoch="best"),
    "difference": difference_table,
    "operating_points": operating_table,
    "per_class_ap": lambda result: per_class_table(result).reset_index(),
    "runs": runs_table,
    "cost": cost_table,
}


def write_profile(folder: Path, profile: Profile) -> list[Path]:
    """Tables (CSV and Markdown) and figures of one results/<profile> tree, from its records. Returns what it wrote."""
    written = []
    result = load_main_result(folder, profile)
    if result is not None:
        for name, build in TABLES.items():
            written += _write_table(folder, name, build(result), result.title)
        written += [plots.save(made, folder / "figures" / f"{name}.png") for name, made in figures(result).items()]
    for study in load_studies(folder, profile).values():
        name = f"ablation_{study.study.name}"
        written += _write_table(folder, name, study_table(study), study.title)
        written += _write_table(folder, f"{name}_differences", difference_rows(study), study.title, digits=3)
        written.append(plots.save(study_figure(study), folder / "figures" / f"{name}.png"))
    return written + _write_regions(folder, profile)


def _write_regions(folder: Path, profile: Profile) -> list[Path]:
    """What notebook 9 measured: tables, the figure, and a gallery where the images are the embedded ones."""
    record = load_regions(folder, profile)
    if record is None:
        return []
    title = _regions_title(record, profile)
    written = _write_table(folder, "attentional_regions", overlap_table(record, profile.run.num_regions), title)
    written += _write_table(folder, "pointing_game", pointing_table(record), title)
    made = {"attentional_regions": regions_figure(record, profile)}
    if profile.run.dataset == "scenes":
        made["attention_gallery"] = gallery_figure(record, Workspace(profile, verbose=False))
    return written + [plots.save(each, folder / "figures" / f"{name}.png") for name, each in made.items()]


def load_studies(folder: Path, profile: Profile) -> dict[str, StudyResult]:
    """The ablations of one results/<profile> folder whose runs have all been made, by name."""
    found = {name: load_study([folder], profile, study) for name, study in studies(profile).items()}
    return {name: result for name, result in found.items() if result is not None and result.is_complete}


def study_figure(result: StudyResult) -> Any:
    """The figure that answers a study's question."""
    table = study_table(result)
    table = table[table["mAP"].notna()]
    if result.study.name == "input_size":
        return plots.study_against_cost(table, result.title)
    if result.study.name == "backbone":
        return plots.study_against_cost(table, result.title, ["M parameters", "GMACs an image"])
    if result.study.name == "num_regions":
        return plots.study_along(table, result.title, reference="N =", xlabel="N, the number of regions")
    return plots.study_settings(table, result.title)


def regions_figure(record: Mapping[str, Any], profile: Profile) -> Any:
    """Objects found by number of regions and by object size, for each way to choose regions."""
    title = _regions_title(record, profile)
    return plots.regions_found(pd.DataFrame(record["overlap"]), FOUND, profile.run.num_regions, title)


def _regions_title(record: Mapping[str, Any], profile: Profile) -> str:
    caution = ", not comparable with published figures" if "subset of" in record["data"] else ""
    return f"{profile.title}: {record['data']}{caution}"


def gallery_figure(record: Mapping[str, Any], workspace: Workspace) -> Any:
    """The gallery of a regions record, over the images of the workspace's data."""
    config = workspace.profile.run
    test, shown = workspace.data(config).test, record["gallery"]
    return plots.attention_gallery(
        [resize_square(test.image(at), config.image_size) for at in range(len(shown))],
        [upsampled(each["cells"], config.image_size) for each in shown],
        [torch.tensor(each["boxes"]) for each in shown],
        [each["labels"] for each in shown],
        [each["annotated"] for each in shown],
        config.threshold,
    )


def photos_figure(released: ReleasedModel, photos: Mapping[str, Path], num_regions: int = 3) -> Any:
    """What a released model looks at in photos, by their captions: the regions of the best-scored classes."""
    images = [read_image(path) for path in photos.values()]
    output = released.predict(images)
    assert output.regions is not None
    boxes, classes = output.regions.boxes[:, :num_regions].cpu(), output.regions.classes[:, :num_regions]
    scores = output.scores.gather(1, classes).tolist()
    labels = [
        [f"{released.classes[k]} ({100 * score:.0f} %)" for k, score in zip(row, of_row, strict=True)]
        for row, of_row in zip(classes.tolist(), scores, strict=True)
    ]
    return plots.attention_gallery(
        [resize_square(image, released.image_size) for image in images],
        list(released.attention_maps(images, classes).cpu()),
        list(boxes),
        labels,
        [[] for _ in images],
        released.model.threshold,
        list(photos),
    )


def _write_table(folder: Path, name: str, table: pd.DataFrame, title: str, digits: int = 1) -> list[Path]:
    return [
        write_text(folder / "tables" / f"{name}.csv", table.to_csv(index=False, float_format="%.4f")),
        write_text(folder / "tables" / f"{name}.md", f"{title}\n\n{markdown(table, digits)}"),
    ]


def figures(result: MainResult) -> dict[str, Any]:
    """The figures of the main comparison by file name."""
    histories = {name: group[0].content["history"] for name, group in result.runs.items()}
    return {
        "main_results": plots.main_results(runs_table(result), result.title),
        "per_class_ap": plots.per_class(per_class_table(result), result.title),
        "curves": plots.curves(histories),
    }


def write_text(path: Path, text: str) -> Path:
    """Writes UTF-8 text with Unix line ends, whole or not at all; raises ResultsError if it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8", newline="\n"))
    except OSError as error:
        raise ResultsError(f"{path} cannot be written ({error.strerror}); choose another --results folder") from error
    return path


def markdown(table: pd.DataFrame, digits: int = 1) -> str:
    """A Markdown table; floats with one digit behind the point, missing values as a dash."""
    lines = ["| " + " | ".join(str(name) for name in table.columns) + " |", "|" + " --- |" * len(table.columns)]
    for row in table.itertuples(index=False):
        lines.append("| " + " | ".join(_cell(value, digits) for value in row) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: object, digits: int) -> str:
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.{digits}f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value > 9999 else str(value)


# Comparisons with earlier records ----------------------------------------------------------------------------------


def compare_results(committed: Path, local: Path) -> pd.DataFrame:
    """Committed records against those made here, matched by configuration: fused and global mAP, last epoch."""
    theirs, ours = (
        {record.config.model_dump_json(): record for record in read_records(folder) if record.is_scored}
        for folder in (committed, local)
    )
    rows = []
    for key in dict.fromkeys([*theirs, *ours]):
        for stream in ("fused", "global"):
            then, here = theirs.get(key), ours.get(key)
            rows.append(_compared((then or ours[key]).config.label, stream, then, here))
    columns = ["run", "metric", "committed", "here", "difference", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def _compared(label: str, stream: str, then: Record | None, here: Record | None) -> list[object]:
    metric = f"mAP {stream}"
    if then is None or here is None:
        shown = [None if record is None else 100 * record.map(stream) for record in (then, here)]
        return [label, metric, *shown, None, "only here" if then is None else "only committed"]
    difference = here.map(stream) - then.map(stream)
    close = "within tolerance" if abs(difference) <= TOLERANCE else "different"
    verdict = "same" if difference == 0 else close
    return [label, metric, 100 * then.map(stream), 100 * here.map(stream), 100 * difference, verdict]

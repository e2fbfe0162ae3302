"""How a notebook shows and keeps what it found: frames of runs, tables as CSV and Markdown, figures, README blocks.

Nothing here trains or measures, and nothing knows which notebook asks.
"""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import pandas as pd
from PIL import Image, ImageChops, ImageStat

from mcar_lib.errors import ResultsError
from mcar_lib.files import project_root, write_bytes, write_text
from mcar_lib.runs import Failure, Record, RunConfig, Runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLOCK = re.compile(r"(<!-- generated: (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
ROUNDING = 16  # difference, of 255, that a pixel of a line may have where numbers differ in their last bits
GREY_LEVELS = 1.0  # mean difference, of 255, that two drawings of one figure may have: fonts differ between machines
P_VALUES = ("p", "p (Holm)")  # shown with three digits


def differing(configs: Sequence[RunConfig]) -> pd.DataFrame:
    """One row a run with its model and seed, and the values in which the runs differ from one another."""
    table = pd.DataFrame([{"model": config.model, **config.model_dump()} for config in configs])
    varied = [name for name in table if table[name].astype(str).nunique() > 1]
    return table[[*(name for name in varied if name not in ("model", "seed", "local_stream")), "model", "seed"]]


def title_of(runs: Runs, found: Sequence[Record | Failure]) -> str:
    """For the tables and figures of some runs: profile, length of the runs, test data, and a caution for a subset.

    Raises ResultsError where none of them could be had.
    """
    records = [each for each in found if isinstance(each, Record)]
    if not records:
        reasons = dict.fromkeys(each.error for each in found if isinstance(each, Failure))
        raise ResultsError(f"profile {runs.profile.name}: none of these runs could be had: {'; '.join(reasons)}")
    caution = ", not comparable with the published figures" if records[0].data["subset"] else ""
    epochs = " or ".join(map(str, sorted({record.config.epochs for record in records})))
    return f"profile {runs.profile.name}, {epochs} epochs; {records[0].data['test']}{caution}"


def save(
    runs: Runs,
    found: Sequence[Record | Failure],
    tables: Mapping[str, pd.DataFrame],
    figures: Mapping[str, "Figure"] | None = None,
) -> None:
    """Writes tables (name -> frame, as CSV and Markdown) and figures (name -> figure, as PNG) of some runs.

    They go beside the records: into results/<profile>, or into results/local/<profile> where one of the runs is from
    there or could not be had, so that no committed table loses a row. Raises ResultsError if that cannot be written.
    """
    is_first = all(isinstance(each, Record) and each.path.is_relative_to(runs.folder) for each in found)
    folder, title = runs.folder if is_first else runs.local_folder, title_of(runs, found)
    for name, table in tables.items():
        write_text(folder / "tables" / f"{name}.csv", table.to_csv(index=False, float_format="%.4f"))
        write_text(folder / "tables" / f"{name}.md", f"{title}\n\n{markdown(table)}")
    for name, figure in (figures or {}).items():
        save_figure(folder / "figures" / f"{name}.png", figure)


def save_figure(path: Path, figure: "Figure") -> None:
    """Writes a PNG without anything that changes from day to day. Where no pixel differs by more than ROUNDING,
    the picture that is there stays: processors round otherwise, and that would show as a change in git."""
    fresh = io.BytesIO()
    figure.savefig(fresh, format="png", dpi=150, metadata={"Software": None})
    apart = _apart(path, fresh) if path.exists() else None
    if apart is None or max(high for _, high in apart.extrema) > ROUNDING:
        write_bytes(path, fresh.getbuffer())


def same_picture(a: Path, b: Path) -> bool:
    """Whether two pictures of one size differ by no more than GREY_LEVELS on average."""
    apart = _apart(a, b)
    return apart is not None and max(apart.mean) <= GREY_LEVELS


def _apart(a: Path, b: Path | io.BytesIO) -> ImageStat.Stat | None:
    """How far the pixels of two pictures lie apart; None for pictures of different sizes."""
    one, two = (Image.open(path).convert("RGB") for path in (a, b))
    return ImageStat.Stat(ImageChops.difference(one, two)) if one.size == two.size else None


def markdown(table: pd.DataFrame, digits: int = 1) -> str:
    """A Markdown table; floats with one digit behind the point (p-values: three), missing values as a dash."""
    lines = ["| " + " | ".join(map(str, table.columns)) + " |", "|" + " --- |" * len(table.columns)]
    places = [3 if name in P_VALUES else digits for name in table.columns]
    for row in table.itertuples(index=False):
        lines.append("| " + " | ".join(map(_cell, row, places)) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: object, digits: int) -> str:
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.{digits}f}" if abs(value) >= 0.1 or value == 0 or digits > 1 else f"{value:.2g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value > 9999 else str(value)


def fill_blocks(path: Path, blocks: Mapping[str, str]) -> None:
    """Replaces what stands between the markers of a file; raises ResultsError if its markers are others than blocks."""
    text = path.read_text(encoding="utf-8")
    names = [match["name"] for match in BLOCK.finditer(text)]
    if sorted(names) != sorted(blocks):
        raise ResultsError(f"{path}: its generated blocks are {names}, wanted {sorted(blocks)}; mend the markers")
    write_text(path, BLOCK.sub(lambda match: f"{match[1]}{blocks[match['name']]}{match[3]}", text))


def read_published(name: str) -> pd.DataFrame:
    """One of the tables of results/published, each row with its source; missing values stay empty."""
    return pd.read_csv(project_root() / "results" / "published" / name, keep_default_na=False)


def beside_published(groups: Sequence[Sequence[Record]]) -> pd.DataFrame:
    """The published mAP (percent, "-" where nothing was published) with ours, the mean over each group's runs, where
    data set (in full), backbone and input size agree."""
    rows = []
    for (backbone, size), cells in read_published("map.csv").groupby(["backbone", "image_size"], sort=False):
        published = {cell.dataset: f"{cell.percent}" for cell in cells.itertuples()}
        same = [
            f"{100 * fmean(record.map() for record in group):.1f}"
            for group in groups
            if (group[0].config.backbone, group[0].config.image_size) == (backbone, size)
            and group[0].config.dataset in published
            and not group[0].data["subset"]
        ]
        shown = {dataset: published.get(dataset, "-") for dataset in ("voc2007", "voc2012", "coco2014")}
        rows.append({"backbone": backbone, "input": size, **shown, "ours": ", ".join(same) or "not run"})
    return pd.DataFrame(rows)

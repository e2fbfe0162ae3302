"""How a notebook shows and keeps what it found: frames of runs, tables as CSV and Markdown, figures, README blocks.

Nothing here trains or measures, and nothing knows which notebook asks.
"""

import io
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import pandas as pd
from PIL import Image, ImageChops, ImageStat

from mcar_lib.errors import ResultsError, as_markdown, printable
from mcar_lib.files import file_hash, read_json, shipped, write_bytes, write_json, write_text
from mcar_lib.progress import say
from mcar_lib.runs import Failure, Record, RunConfig, Runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLOCK = re.compile(r"(<!-- generated: (?P<name>[a-z-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
ROUNDING = 16  # difference, of 255, that a pixel of a line may have where numbers differ in their last bits
GREY_LEVELS = 1.0  # mean difference, of 255, that two drawings of one figure may have: fonts differ between machines
P_VALUES = ("p", "p (Holm)")  # shown with three digits
INDEXED = {".md": "table", ".csv": "CSV", ".png": "figure"}  # files that the page of a profile names, by their kind
UNTOLD = ("-", "-")  # of a table or figure, in that page
PAGE_MARK = "Written by notebook 10"  # a line of the page that sums up a results folder


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
) -> Path:
    """Writes tables (name -> frame, as CSV and Markdown) and figures (name -> figure, as PNG) of some runs; returns the
    folder below which they lie.

    They go beside the records: into results/<profile>, or into results/local/<profile> where one of the runs is from
    there or could not be had, so that no committed table loses a row. What somebody else put there under one of these
    names is moved aside. Raises ResultsError if that cannot be written.
    """
    is_first = all(isinstance(each, Record) and each.path.is_relative_to(runs.folder) for each in found)
    written, title = Generated(runs.folder if is_first else runs.local_folder), title_of(runs, found)
    for name, table in tables.items():
        written.put_text(f"tables/{name}.csv", table.to_csv(index=False, float_format="%.4f"))
        written.put_text(f"tables/{name}.md", f"{title}\n\n{markdown(table)}")
    for name, figure in (figures or {}).items():
        written.put_figure(f"figures/{name}.png", figure)
    return written.folder


class Generated:
    """The files that notebooks wrote below a folder: generated.json there has their names, each with a hash.

    A file that is not as it was written is somebody's own: it is never overwritten or removed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "generated.json"

    def hashes(self) -> dict[str, str]:
        """Name -> SHA-256 as the file was written."""
        if not self.path.exists():
            return {}
        try:
            return {name: str(digest) for name, digest in read_json(self.path).items()}
        except ResultsError as error:
            say(f"{error}; files beside it are taken for somebody's own")
            return {}

    def put_text(self, name: str, text: str) -> None:
        self._put(name, text.encode())

    def put_figure(self, name: str, figure: "Figure") -> None:
        """Writes a PNG without anything that changes from day to day. Where no pixel differs by more than ROUNDING,
        the picture that is there stays: processors round otherwise, and that would show as a change in git."""
        fresh, path = io.BytesIO(), self.folder / name
        figure.savefig(fresh, format="png", dpi=150, metadata={"Software": None})
        self._put(name, path.read_bytes() if path.exists() and _looks_the_same(path, fresh) else fresh.getvalue())

    def _put(self, name: str, content: bytes) -> None:
        """Writes a file and notes it; somebody's own is moved aside."""
        self.set_aside(name, but=content)
        write_bytes(self.folder / name, content)
        self.note(name)

    def note(self, name: str) -> None:
        """Says that a file is as it was written."""
        write_json(self.path, dict(sorted({**self.hashes(), name: file_hash(self.folder / name)}.items())))

    def set_aside(self, name: str, but: bytes | None = None) -> None:
        """Renames a file that is not as it was written to NAME.yours.EXT, and says so; but: of that content it is."""
        path = self.folder / name
        if not path.exists() or self.hashes().get(name) == file_hash(path) or path.read_bytes() == but:
            return
        free = (path.with_name(f"{path.stem}.yours{count or ''}{path.suffix}") for count in range(1000))
        kept = next(each for each in free if not each.exists())
        path.rename(kept)
        say(f"{path}: changed or made by somebody else; kept as {kept.name}")

    def state(self) -> dict[str, tuple[int, int]]:
        """What tells whether a noted file is written again."""
        found = {name: self.folder / name for name in self.hashes()}
        return {name: (path.stat().st_ino, path.stat().st_mtime_ns) for name, path in found.items() if path.is_file()}

    def remove_stale(self, before: Mapping[str, tuple[int, int]]) -> None:
        """Removes what was not written again since that state, and says so; somebody's changes stay."""
        hashes, now = self.hashes(), self.state()
        stale = [name for name in before if now.get(name) == before[name]]
        for name in stale:
            if hashes.pop(name) == file_hash(self.folder / name):
                (self.folder / name).unlink()
                say(f"{self.folder / name}: removed, no notebook writes it any more")
        if stale:
            write_json(self.path, hashes)


def own_files(results: Path, written: Collection[str] = ()) -> list[str]:
    """Files beside the tables and figures of the folder results that no notebook has written, as results/..."""
    found = []
    noted = {folder: Generated(folder).hashes() for folder in results.glob("*")}
    for kind in ("tables", "figures"):
        for path in sorted(results.glob(f"*/{kind}/*")):
            name, known = str(path.relative_to(results.parent)), noted[path.parent.parent]
            if path.name[0] != "." and name not in written and f"{kind}/{path.name}" not in known:
                found.append(name)
    return found


def write_index(folder: Path, title: str, about: Mapping[str, tuple[str, str]]) -> None:
    """Writes README.md into a profile's folder of results: a line with links for every table and figure there that a
    notebook wrote.

    about: name of a table or figure -> what it is, and who writes it. What is not in it keeps the line that the page
    has; new lines come after those, and last, with dashes, what nobody has told of. Files of somebody's own are left
    out.
    """
    written = Generated(folder)
    about = {**_told_in_index(folder / "README.md"), **about}
    paths = [Path(name) for name in sorted(written.hashes()) if (folder / name).is_file()]
    paths = [path for path in paths if path.parts[0] in ("tables", "figures") and path.suffix in INDEXED]
    rows = []
    for name in dict.fromkeys([*about, *(path.stem for path in paths)]):
        of_name = [path for path in paths if path.stem == name]
        links = [f"[{INDEXED[path.suffix]}]({path.as_posix()})" for path in of_name]
        if links:
            what, who = about.get(name, UNTOLD)
            rows.append({"name": name, "what it is": what, "files": ", ".join(links), "written by": who})
    mark = f"{PAGE_MARK} from what lies in this folder; do not edit by hand."
    written.put_text("README.md", f"# {title}\n\n{mark}\n\n{markdown(pd.DataFrame(rows))}")


def _told_in_index(page: Path) -> dict[str, tuple[str, str]]:
    """What write_index was told for this page before."""
    text = page.read_text(encoding="utf-8", errors="replace") if page.exists() else ""
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]  # below the head
    told = {row[0]: (row[1], row[3]) for row in rows if len(row) == 4}
    return {name: each for name, each in told.items() if each != UNTOLD and not name.startswith("---")}


def write_page(path: Path, text: str) -> None:
    """Writes the page that sums up a results folder; raises ResultsError where a page of somebody else lies."""
    if path.exists() and PAGE_MARK not in path.read_text(encoding="utf-8", errors="replace"):
        raise ResultsError(f"{path} is not a page of this project, so it stays; rename it, or choose other results")
    write_text(path, text)


def _looks_the_same(a: Path, b: io.BytesIO) -> bool:
    try:
        apart = _apart(a, b)
    except OSError:  # what is there is no picture
        return False
    return apart is not None and max(high for _, high in apart.extrema) <= ROUNDING


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
    lines = ["| " + " | ".join(_one_line(str(name)) for name in table.columns) + " |"]
    lines.append("|" + " --- |" * len(table.columns))
    places = [3 if name in P_VALUES else digits for name in table.columns]
    for row in table.itertuples(index=False):
        cells = [_one_line(_cell(*each)) for each in zip(row, places, strict=True)]
        plain = [as_markdown(cell) if name == "class" else cell for name, cell in zip(table, cells, strict=True)]
        lines.append("| " + " | ".join(plain) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: object, digits: int) -> str:
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.{digits}f}" if abs(value) >= 0.1 or value == 0 or digits > 1 else f"{value:.2g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value > 9999 else str(value)


def _one_line(text: str) -> str:
    """Text that ends neither its cell nor its row, whatever a name in it holds."""
    return re.sub(r"(?<!\\)\|", r"\\|", printable(" ".join(text.splitlines())))


def fill_blocks(path: Path, blocks: Mapping[str, str]) -> None:
    """Replaces what stands between the markers of some blocks of a file, name -> text; blocks of others stay as they
    are. Raises ResultsError unless the file has each of them once."""
    text = path.read_text(encoding="utf-8")
    names = [match["name"] for match in BLOCK.finditer(text)]
    if any(names.count(name) != 1 for name in blocks):
        raise ResultsError(f"{path}: its generated blocks are {names}, wanted {sorted(blocks)}; mend the markers")

    def filled(match: re.Match[str]) -> str:
        return f"{match[1]}{blocks[match['name']]}{match[3]}" if match["name"] in blocks else match[0]

    write_text(path, BLOCK.sub(filled, text))


def read_published(name: str) -> pd.DataFrame:
    """One of the tables of results/published, each row with its source; missing values stay empty."""
    return pd.read_csv(shipped("results/published") / name, keep_default_na=False)


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

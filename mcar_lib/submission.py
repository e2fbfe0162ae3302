"""The archive of scores that the PASCAL VOC evaluation server takes for VOC2012 test, whose labels it holds.

results/VOC2012/Main/comp2_cls_test_<class>.txt in a .tar.gz, one "<image id> <score>" a line: the classification task
of the VOC2012 development kit, competition 2 (trained on more than VOC: our backbones have seen ImageNet).
"""

import gzip
import io
import math
import re
import tarfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mcar_lib.data.preparation import Problems
from mcar_lib.data.voc import VOC_CLASSES
from mcar_lib.errors import ResultsError
from mcar_lib.training import write_atomically

FOLDER = "results/VOC2012/Main"
FILE_NAME = re.compile(r"comp2_cls_test_(\w+)\.txt")
COMPRESSION = 9


@dataclass(frozen=True, eq=False)
class Submission:
    """What an archive says: scores float64 (n, 20) of image_ids (n) and classes (20), in the order of VOC_CLASSES."""

    image_ids: tuple[str, ...]
    classes: tuple[str, ...]
    scores: Tensor


def write_voc2012_submission(
    path: Path | str, image_ids: Sequence[str], classes: Sequence[str], scores: Tensor
) -> Path:
    """Write the archive whole or not at all; the same scores give the same bytes.

    image_ids: n of them, each once, without spaces. classes: the 20 VOC classes in any order. scores: (n, 20), any
    finite numbers, higher is more likely; every digit is written. Raises DataError when these do not fit together,
    ResultsError when the file cannot be written.
    """
    path = Path(path)
    scores = torch.as_tensor(scores).detach().cpu()
    _check(image_ids, classes, scores)
    column = {name: number for number, name in enumerate(classes)}
    values = scores.numpy() if scores.is_floating_point() and scores.dtype.itemsize >= 4 else scores.float().numpy()
    texts = {name: _score_file(image_ids, values[:, column[name]]) for name in VOC_CLASSES}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda written: written.write_bytes(_archive(texts)))
    except OSError as error:
        raise ResultsError(f"{path} cannot be written ({error.strerror}); choose another --output") from error
    return path


def read_voc2012_submission(path: Path | str) -> Submission:
    """Read such an archive and check it: 20 files, one a class, the same image ids in each, every score finite.

    Raises ResultsError when the file cannot be read, one DataError that lists all that is wrong in it.
    """
    path = Path(path)
    problems = Problems(str(path))
    found: dict[str, dict[str, float]] = {}
    try:
        with tarfile.open(path, "r:gz") as tar:
            for member in tar:
                class_name = _class_of(member, problems)
                if class_name is not None:
                    file = tar.extractfile(member)
                    assert file is not None  # _class_of takes regular files only
                    found[class_name] = _read_scores(file.read(), member.name, problems)
    except (OSError, tarfile.TarError, EOFError, zlib.error) as error:
        raise ResultsError(f"{path} cannot be read as a .tar.gz archive ({error})") from error
    for name in VOC_CLASSES:
        if name not in found:
            problems.add(f"{FOLDER}/comp2_cls_test_{name}.txt is not in it")
    problems.raise_if_any()
    image_ids = tuple(found[VOC_CLASSES[0]])
    for name in VOC_CLASSES:
        if set(found[name]) != set(image_ids):
            differing = sorted(set(found[name]) ^ set(image_ids))
            problems.add(
                f"{name} and {VOC_CLASSES[0]} score different images: {len(differing):,} are in one of them only, "
                f"the first is {differing[0]}"
            )
    problems.raise_if_any()
    rows = [[found[name][image_id] for name in VOC_CLASSES] for image_id in image_ids]
    return Submission(image_ids, VOC_CLASSES, torch.tensor(rows, dtype=torch.float64).reshape(-1, len(VOC_CLASSES)))


def _check(image_ids: Sequence[str], classes: Sequence[str], scores: Tensor) -> None:
    problems = Problems("scores for VOC2012 test")
    if sorted(classes) != sorted(VOC_CLASSES):
        problems.add(f"the classes should be the 20 of VOC, found {', '.join(classes)}")
    if not image_ids:
        problems.add("no images")
    if len(set(image_ids)) != len(image_ids):
        problems.add(f"{len(image_ids) - len(set(image_ids)):,} image ids are repeated")
    unreadable = [image_id for image_id in image_ids if len(image_id.split()) != 1]
    if unreadable:
        problems.add(f"an image id is one word, found {unreadable[0]!r}")
    if tuple(scores.shape) != (len(image_ids), len(classes)):
        wanted = f"({len(image_ids)}, {len(classes)})"
        problems.add(f"scores should be {wanted}, images by classes, found {tuple(scores.shape)}")
    elif not torch.isfinite(scores).all():
        row, column = (~torch.isfinite(scores)).nonzero()[0].tolist()
        problems.add(f"the score of {image_ids[row]} for {classes[column]} is {scores[row, column].item()}")
    problems.raise_if_any()


def _score_file(image_ids: Sequence[str], scores: np.ndarray) -> str:
    # As few digits as tell this number from its neighbours, and no exponent, which not every reader knows.
    numbers = (np.format_float_positional(score, unique=True, trim="0") for score in scores)
    return "".join(f"{image_id} {number}\n" for image_id, number in zip(image_ids, numbers, strict=True))


def _archive(texts: dict[str, str]) -> bytes:
    """The .tar.gz without a date, an owner or a file name in it."""
    packed = io.BytesIO()
    with (
        gzip.GzipFile("", "wb", COMPRESSION, packed, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for class_name, text in sorted(texts.items()):
            content = text.encode()
            member = tarfile.TarInfo(f"{FOLDER}/comp2_cls_test_{class_name}.txt")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def _class_of(member: tarfile.TarInfo, problems: Problems) -> str | None:
    """The class whose scores a member holds; folders hold none, and anything else has no place in the archive."""
    folder, _, name = member.name.removeprefix("./").rpartition("/")
    match = FILE_NAME.fullmatch(name)
    if member.isreg() and folder == FOLDER and match and match[1] in VOC_CLASSES:
        return match[1]
    if not member.isdir():
        problems.add(f"{member.name}: not a file {FOLDER}/comp2_cls_test_<class>.txt of one of the 20 classes")
    return None


def _read_scores(content: bytes, name: str, problems: Problems) -> dict[str, float]:
    scores: dict[str, float] = {}
    for number, line in enumerate(content.decode(errors="replace").splitlines(), start=1):
        fields = line.split()
        try:
            image_id, score = fields[0], float(fields[1])
        except (IndexError, ValueError):
            fields = []
        if len(fields) != 2 or not math.isfinite(score):
            problems.add(f"{name}:{number}: expected '<image id> <score>' with a finite score, found {line!r}")
        elif image_id in scores:
            problems.add(f"{name}:{number}: image {image_id} is scored twice")
        else:
            scores[image_id] = score
    if not scores:
        problems.add(f"{name}: no scores")
    return scores

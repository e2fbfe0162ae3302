"""The archive of scores that the PASCAL VOC evaluation server takes for VOC2012 test, whose labels it holds.

results/VOC2012/Main/comp2_cls_test_<class>.txt in a .tar.gz, one "<image id> <score>" a line: the classification task
of the VOC2012 development kit, competition 2 (trained on more than VOC: our backbones have seen ImageNet).
"""

import gzip
import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mcar_lib.data.preparation import Problems
from mcar_lib.data.voc import VOC_CLASSES
from mcar_lib.errors import ConfigError
from mcar_lib.files import write_bytes

FOLDER = "results/VOC2012/Main"
COMPRESSION = 9


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
    write_bytes(path, _archive(texts), advice="choose another --output")
    return path


def check_output(path: Path) -> None:
    """What would be written over is such an archive, or else ConfigError."""
    if os.path.lexists(path) and not _is_archive(path):
        raise ConfigError(f"{path} is there and is no archive that mcar submit wrote; choose another --output")


def _is_archive(path: Path) -> bool:
    try:
        with tarfile.open(path, "r:gz") as tar:
            first = tar.next()
    except Exception:  # whatever it is, it is another's
        return False
    return first is not None and first.name.startswith(f"{FOLDER}/comp2_cls_test_")


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

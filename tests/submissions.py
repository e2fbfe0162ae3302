"""The archive for the PASCAL server, read back as the server would: strict about names, lines and numbers."""

import math
import re
import tarfile
from pathlib import Path
from typing import NamedTuple

import torch

from mcar_lib.data.voc import VOC_CLASSES

NAME = re.compile(r"results/VOC2012/Main/comp2_cls_test_(\w+)\.txt")


class Submission(NamedTuple):
    """image_ids (n) and their float64 scores (n, 20), classes in the order of VOC_CLASSES."""

    image_ids: tuple[str, ...]
    scores: torch.Tensor


def members(path: Path) -> dict[str, str]:
    """Name and text of each file of a .tar.gz."""
    with tarfile.open(path, "r:gz") as tar:
        return {member.name: tar.extractfile(member).read().decode() for member in tar}  # type: ignore[union-attr]


def read_submission(path: Path) -> Submission:
    """Fails unless there are the 20 files alone, each with a finite score for the same image ids in the same order."""
    columns = {}
    for name, text in members(path).items():
        named = NAME.fullmatch(name)
        assert named is not None, name
        lines = [line.split(" ") for line in text.removesuffix("\n").split("\n")]
        assert all(len(line) == 2 and math.isfinite(float(line[1])) for line in lines), name
        columns[named[1]] = {image_id: float(score) for image_id, score in lines}
        assert len(columns[named[1]]) == len(lines), name
    assert sorted(columns) == sorted(VOC_CLASSES)
    (image_ids,) = {tuple(column) for column in columns.values()}
    scores = [[columns[name][image_id] for name in VOC_CLASSES] for image_id in image_ids]
    return Submission(image_ids, torch.tensor(scores, dtype=torch.float64))

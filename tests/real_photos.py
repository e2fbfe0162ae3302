"""Where the tests find real photos: MCAR_TEST_DATA, by default ../shared/data beside the repository."""

import os
from pathlib import Path

import pytest

PHOTOS = Path(os.environ.get("MCAR_TEST_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def real_voc2007() -> Path:
    """A data root that holds VOCdevkit/VOC2007 with real photos; skips the test where there is none."""
    return _require(PHOTOS / "voc2007-photos", "VOCdevkit/VOC2007")


def real_coco2014() -> Path:
    """A data root that holds COCO 2014 annotations and photos; skips the test where there is none."""
    return _require(PHOTOS / "coco2014-photos", "annotations")


def _require(root: Path, inside: str) -> Path:
    if not (root / inside).is_dir():
        pytest.skip(f"no real photos: {root / inside} is missing (set MCAR_TEST_DATA)")
    return root

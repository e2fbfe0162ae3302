"""What is on photos, from an ONNX file of `mcar export`, with numpy, Pillow and onnxruntime alone.

python predict_onnx.py model.onnx photo.jpg ...    # a line a label: photo, label, score, x1 y1 x2 y2 in its pixels
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def network_input(photo: Image.Image, side: int, mean: list[float], std: list[float]) -> np.ndarray:
    """A photo, upright -> float32 (1, 3, side, side): the whole of it as a square, normalised."""
    square = photo.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    values = (np.asarray(square, np.float32) / 255 - np.float32(mean)) / np.float32(std)
    return np.ascontiguousarray(values.transpose(2, 0, 1))[None]


def on_photo(box: list[int], side: int, size: tuple[int, int]) -> list[int]:
    """The pixels of a photo of that size that a box of the square touches."""
    (x1, y1, x2, y2), (width, height) = box, size
    return [x1 * width // side, y1 * height // side, -(-x2 * width // side), -(-y2 * height // side)]


def main(model: str, photos: list[str]) -> None:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["mcar"])
    side = about["config"]["image_size"]
    for path in photos:
        with Image.open(path) as opened:
            photo = ImageOps.exif_transpose(opened)
        images = network_input(photo, side, about["mean"], about["std"])
        scores, *regions = (each[0].tolist() for each in session.run(None, {"images": images}))
        boxes = dict(zip(regions[1], regions[0], strict=True)) if regions else {}
        for index in sorted(range(len(scores)), key=lambda index: -scores[index]):
            if scores[index] >= about["decision_threshold"]:
                box = on_photo(boxes[index], side, photo.size) if index in boxes else []
                print(path, about["classes"][index], f"{scores[index]:.4f}", *box, sep="\t")


if __name__ == "__main__":
    if len(sys.argv) < 3 or not Path(sys.argv[1]).is_file():
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])

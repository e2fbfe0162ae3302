"""Models as graphs that need neither this library nor its code: ONNX, and torch.export's .pt2; written, held against
PyTorch, and read back.

A graph is the whole two-stream model, region finding included. Input `images`: (B, 3, S, S) float32, normalised, any B
above 0. Outputs: `scores` (B, K) in [0, 1]; and of a model with a local stream `boxes` (B, N, 4) int64, x1 y1 x2 y2 in
pixels of the square, `classes` (B, N) int64, and `region_scores` (B, N), their global scores.
"""

import contextlib
import importlib.util
import io
import json
import logging
import os
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor, nn

from mcar_lib.backbones import Triple
from mcar_lib.data.transforms import network_input
from mcar_lib.errors import ConfigError, WeightsError
from mcar_lib.files import reading, write_bytes
from mcar_lib.model import MCAR, Output
from mcar_lib.regions import Regions

Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
SUFFIXES = (".onnx", ".pt2")
METADATA = "mcar"  # key of the text that says what the model is
OPSET = 20  # the first whose GridSample and Resize are as they are today
INPUT, OUTPUTS = "images", ("scores", "boxes", "classes", "region_scores")
CHECKED_TOGETHER = 8
CHANGED_TIMES = 8  # an image, to see which boxes its last bit decides; 5 were enough for 7 boxes of 2 backbones
CALIBRATED_WITH = 48  # photos at most, one at a time
# Instructions by which eight-bit products are faster than float ones: of x86 and ARM.
INT8_FLAGS = frozenset({"avx512_vnni", "avx_vnni", "avx_vnni_int8", "amx_int8", "asimddp", "i8mm"})


@dataclass(frozen=True)
class Tolerance:
    """How far a graph may be from PyTorch: the least share of boxes that are equal or decided by the last bit (three of
    a few may be neither), and the largest difference of a score in images whose boxes are all equal."""

    boxes: float
    scores: float


TOLERANCES: Mapping[Precision, Tolerance] = {
    "fp32": Tolerance(253 / 256, 1e-4),
    "fp16": Tolerance(0.25, 0.05),  # weights that half precision does not hold move many a box by a pixel
    "int8": Tolerance(253 / 256, 0.8),  # of a crop; on average it is a hundredth of that
}


@dataclass(frozen=True)
class Agreement:
    """A graph held against PyTorch on images: how many there were, their boxes, those that are equal, of the others
    those that the last bit decides, the largest difference of a score where all boxes of an image are equal (anywhere,
    if they nowhere are), and that anywhere.

    The last bit decides where PyTorch too finds another box if the image changes by no more than its rounding.
    """

    images: int
    boxes: int
    equal: int
    last_bit: int
    where_equal: float
    anywhere: float

    def within(self, tolerance: Tolerance) -> bool:
        allowed = max(3, (1 - tolerance.boxes) * self.boxes)
        return self.boxes - self.equal - self.last_bit <= allowed and self.where_equal <= tolerance.scores

    def __str__(self) -> str:
        boxes = f"boxes equal {self.equal} of {self.boxes}, " if self.boxes else ""
        boxes += f"{self.last_bit} others decided by the last bit, " if self.last_bit else ""
        told = f"{boxes}largest score difference {self.where_equal:.1g}"
        return told if self.equal == self.boxes else f"{told} where boxes are equal, {self.anywhere:.1g} anywhere"


class GraphModel:
    """A graph in place of the MCAR that it was written from: called with normalised images, gives its Output.

    Its global_logits are those of the prediction, of both streams together; what each says alone a graph does not
    keep. mean, std: as MCAR has them. It runs on the CPU.
    """

    device = torch.device("cpu")

    def __init__(self, run: Callable[[Tensor], Sequence[Tensor]], image_size: int, mean: Triple, std: Triple) -> None:
        self.run, self.image_size, self.mean, self.std = run, image_size, mean, std

    def __call__(self, images: Tensor) -> Output:
        """images: (B, 3, S, S) normalised float. Raises ConfigError for no image, or one of another size."""
        wanted = (3, self.image_size, self.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != wanted or not images.shape[0]:
            raise ConfigError(
                f"an exported graph takes images (B, {', '.join(map(str, wanted))}) with B above 0, not "
                f"{tuple(images.shape)}; resize them, or export a model of that size"
            )
        scores, *regions = self.run(images.float().contiguous())
        return Output(torch.logit(scores), None, Regions(*regions) if regions else None)

    def to(self, device: str | torch.device) -> "GraphModel":
        """Itself on the CPU; raises RuntimeError for any other device."""
        if torch.device(device).type != "cpu":
            raise RuntimeError("an exported graph runs on the CPU here; the .safetensors file runs on a GPU")
        return self

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)
        raise ConfigError(f"an exported graph only predicts, it has no {name!r}; load the run or its .safetensors file")


@dataclass(frozen=True)
class Stored:
    """A graph that was read: its texts by key, how to run it, and where they are known the shapes of images and
    scores."""

    metadata: Mapping[str, str]
    run: Callable[[Tensor], Sequence[Tensor]]
    images: Sequence[object] | None = None
    scores: Sequence[object] | None = None


# ---- writing


def write_graph(
    model: MCAR,
    about: Mapping[str, Any],
    path: Path,
    squares: Tensor,
    precision: Precision = "fp32",
    calibration: Tensor | None = None,
) -> Agreement:
    """Writes a model in evaluation mode as the graph that the suffix of path names, once it agrees with PyTorch.

    about: what the file says of itself, JSON, with "config" and its image_size S. squares: uint8 (M, 3, S, S), on which
    both are held against each other. precision: "fp16" keeps the weights in half precision and computes in float32;
    "int8" computes the local stream in 8 bits, with ranges from calibration, uint8 (n, 3, S, S).
    Raises ConfigError on what cannot be exported, or a package that is missing, WeightsError where the graph disagrees
    or the file cannot be written. An earlier file then stays.
    """
    _check_exportable(model, path, precision, calibration)
    side = int(squares.shape[-1])
    about = {**about, "graph": {"opset": OPSET, "precision": precision, "torch": torch.__version__}}
    traced = _traced(model, side)
    if path.suffix == ".pt2":
        content = _pt2(traced, about)
    else:
        samples = None if calibration is None else network_input(model, calibration[:CALIBRATED_WITH])
        content = _onnx(traced, about, precision, samples)
    graph = GraphModel(_opened(content, path).run, side, model.mean, model.std)
    found = agreement(model, graph, squares)
    if not found.within(TOLERANCES[precision]):
        advice = "try other versions of torch or onnxruntime" if precision == "fp32" else "choose --precision fp32"
        raise WeightsError(f"{path} is not written: the graph disagrees with PyTorch ({found}); {advice}")
    write_bytes(path, content, WeightsError, "choose another file")
    return found


def check_graph_path(path: Path) -> None:
    """What would be written over is a graph that write_graph wrote, or else ConfigError."""
    if os.path.lexists(path) and not _is_ours(path):
        raise ConfigError(
            f"{path} is there and is no model that mcar export wrote; choose another file, or move it away"
        )


def _is_ours(path: Path) -> bool:
    try:
        content = path.read_bytes()
        return METADATA in (_pt2_texts(content) if path.suffix == ".pt2" else _onnx_texts(content))
    except Exception:  # a broken file, or of any other kind
        return False


def agreement(model: MCAR, graph: GraphModel, squares: Tensor) -> Agreement:
    """Both on uint8 (M, 3, S, S): the first image alone, the others together."""
    first, others = squares[:1], squares[1:].split(CHECKED_TOGETHER)
    each = [_compared(model, graph, part) for part in (first, *others) if len(part)]
    boxes, same, last_bit, difference = (torch.cat(parts) for parts in zip(*each, strict=True))
    where_equal = difference[same == boxes]
    return Agreement(
        len(squares),
        int(boxes.sum()),
        int(same.sum()),
        int(last_bit.sum()),
        (where_equal if len(where_equal) else difference).max().item(),
        difference.max().item(),
    )


@torch.no_grad()
def _compared(model: MCAR, graph: GraphModel, squares: Tensor) -> tuple[Tensor, ...]:
    """Of each image: its number of boxes, of equal ones, of others that the last bit decides, and the largest
    difference of a score."""
    images = network_input(model, squares)
    one, other = model(images), graph(images)
    difference = (one.scores - other.scores).abs().amax(dim=1).nan_to_num(nan=float("inf"))
    if one.regions is None or other.regions is None:
        none = torch.zeros(len(squares), dtype=torch.int64)
        return none, none, none, difference
    same = _equal(one.regions, other.regions)
    by_last_bit = ~same
    for index in (~same).any(dim=1).nonzero()[:, 0].tolist():
        by_last_bit[index] &= _of_last_bit(model, images[index : index + 1])
    return torch.full((len(squares),), same.shape[1]), same.sum(dim=1), by_last_bit.sum(dim=1), difference


def _equal(one: Regions, other: Regions) -> Tensor:
    """Which boxes (B, N) are equal and of the same class."""
    return (one.boxes == other.boxes).all(dim=-1) & (one.classes == other.classes)


def _of_last_bit(model: MCAR, image: Tensor) -> Tensor:
    """Which regions (N,) of an image (1, 3, S, S) PyTorch finds elsewhere where the image changes by its rounding."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((CHANGED_TIMES, *image.shape[1:]), generator=generator)
    changed = image * (1 + torch.finfo(image.dtype).eps * noise)
    regions = [model.pass_over_images(each[None])[1] for each in (image[0], *changed)]
    first, *others = (each for each in regions if each is not None)
    return ~torch.cat([_equal(first, each) for each in others]).all(dim=0)


def drawn_squares(side: int, count: int = 16) -> Tensor:
    """uint8 (count, 3, side, side): patches of colour, always the same ones, where there are no photos to look at."""
    coarse = torch.rand((count, 3, 6, 6), generator=torch.Generator().manual_seed(0))
    smooth = nn.functional.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=True)
    return (255 * smooth).clamp(0, 255).to(torch.uint8)


def _check_exportable(model: MCAR, path: Path, precision: Precision, calibration: Tensor | None) -> None:
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path}: a graph's name ends in {' or '.join(SUFFIXES)}")
    if precision not in PRECISIONS:
        raise ConfigError(f"precision is {precision!r}; choose one of {', '.join(PRECISIONS)}")
    if path.suffix == ".pt2" and precision != "fp32":
        raise ConfigError(f"{path}: a .pt2 file is written in fp32 only; {precision} is for .onnx")
    if model.selection == "random" or model.box_source in ("random boxes", "other photo"):
        raise ConfigError(
            "a graph cannot hold regions that are drawn at random or taken from another photo; export a run with "
            "selection top or bottom and box_source maps"
        )
    if precision == "int8" and (calibration is None or not len(calibration)):
        raise ConfigError("int8 needs photos like those it will see, to choose its ranges by: name a folder of them")
    if path.suffix == ".onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            _require(package, f"writing {path.name}")


def _require(package: str, job: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{job} needs the package {package}, which is not installed: pip install 'mcar-lib[onnx]', "
            "or in a checkout pip install -e '.[onnx]'"
        )


class _SideBySide(nn.Module):
    """The model with its answers as a graph gives them."""

    def __init__(self, model: MCAR) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        output: Output = self.model(images)
        return (output.scores, *(output.regions or ()))


@torch.no_grad()
def _traced(model: MCAR, side: int) -> torch.export.ExportedProgram:
    example, free = torch.zeros(2, 3, side, side), {INPUT: {0: torch.export.Dim("batch", min=1)}}
    with _quiet():
        return torch.export.export(_SideBySide(model).eval(), (example,), dynamic_shapes=free)


def _pt2(traced: torch.export.ExportedProgram, about: Mapping[str, Any]) -> bytes:
    file = io.BytesIO()
    with _quiet():
        torch.export.save(traced, file, extra_files={METADATA: json.dumps(about)})
    return file.getvalue()


def _onnx(
    traced: torch.export.ExportedProgram, about: Mapping[str, Any], precision: Precision, samples: Tensor | None
) -> bytes:
    import onnx

    with _quiet():
        program = torch.onnx.export(
            traced,
            (),
            dynamo=True,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=OUTPUTS,
            custom_translation_table={torch.ops.aten.sort.stable: _stable_sort()},
        )
        assert program is not None
        graph = program.model_proto
        if precision == "int8":
            assert samples is not None
            graph = _with_int8_crops(graph, samples)
        if precision == "fp16":
            _halve_weights(graph)
    onnx.helper.set_model_props(graph, {METADATA: json.dumps(about)})
    return bytes(graph.SerializeToString())


def _stable_sort() -> Callable[..., Any]:
    """ONNX has no sort; its TopK of all elements is one, in which among equals the lower index comes first too."""
    from onnxscript import opset20 as op

    def sort(values: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
        return op.TopK(values, op.Shape(values, start=1, end=2), axis=dim, largest=int(descending), sorted=1)

    return sort


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What exporters print and warn of is about their own code."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


# ---- smaller numbers


def _halve_weights(graph: Any) -> None:
    """Kernels are kept in half precision and made float32 again when the file is loaded: half the size, and sums keep
    all digits."""
    import numpy as np
    from onnx import helper, numpy_helper

    casts, kernels = [], {each for node in graph.graph.node if node.op_type == "Conv" for each in node.input[1:2]}
    for stored in graph.graph.initializer:
        values = numpy_helper.to_array(stored)
        if stored.name in kernels and values.dtype == np.float32:
            half, name = f"{stored.name}_fp16", stored.name
            casts.append(helper.make_node("Cast", [half], [name], to=1, name=f"{name}_as_float32"))
            stored.CopyFrom(numpy_helper.from_array(values.astype(np.float16), half))
    for cast in reversed(casts):
        graph.graph.node.insert(0, cast)


def _with_int8_crops(graph: Any, samples: Tensor) -> Any:
    """The pass over the crops in 8 bits, ranges by channel of the kernels and by the extremes in samples of the values;
    the global stream, which places the boxes, and the classifier, which both share, stay as they are.

    Kernels use 7 of the 8 bits: pairs of products overflow on processors without instructions of their own for them.
    """
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as folder:
        whole, folded, small = (Path(folder) / f"{name}.onnx" for name in ("whole", "folded", "small"))
        onnx.save(graph, whole)
        quant_pre_process(whole, folded, skip_symbolic_shape=True)
        quantize_static(
            folded,
            small,
            _reader(samples),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=_nodes_of_crops(onnx.load(folded).graph),
            calibrate_method=CalibrationMethod.MinMax,
        )
        return onnx.load(small)


def _nodes_of_crops(graph: Any) -> list[str]:
    """What follows the cropping, but for the last convolution, which is the classifier; all of a baseline's."""
    nodes = list(graph.node)
    start = next((index for index, node in enumerate(nodes) if node.op_type == "GridSample"), -1)
    followed = nodes[start + 1 :]
    classifier = [node.name for node in followed if node.op_type == "Conv"][-1]
    kinds = ("Conv", "Add", "Clip", "Relu", "ReduceMean", "MaxPool")
    return [node.name for node in followed if node.op_type in kinds and node.name != classifier]


def _reader(samples: Tensor) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class OneByOne(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(samples.contiguous().split(1))

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.images, None)
            return None if image is None else {INPUT: image.contiguous().numpy()}

    return OneByOne()


def int8_told(flags: frozenset[str] | None = None) -> str | None:
    """A sentence where int8 gains little for want of instructions; None where they are there, or it is not known.

    flags: of the processor, by default as Linux lists them.
    """
    flags = _processor_flags() if flags is None else flags
    if not flags or flags & INT8_FLAGS:
        return None
    return "this processor has no instructions for eight-bit products (VNNI): int8 gains little speed here"


def _processor_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    named = [line.partition(":")[2] for line in lines if line.lower().startswith(("flags", "features"))]
    return frozenset(named[0].split()) if named else frozenset()


# ---- reading


def read_graph(path: Path) -> Stored:
    """A graph that write_graph wrote. Raises WeightsError for any other file, ConfigError without onnxruntime."""
    if path.suffix == ".onnx":
        _require("onnxruntime", f"reading {path.name}")
    with reading(path, "a model that mcar export wrote", WeightsError):
        return _opened(path.read_bytes(), path)


def graph_model(
    stored: Stored, path: Path, about: Mapping[str, Any], side: int, mean: Triple, std: Triple
) -> GraphModel:
    """What predicts, once the file's metadata and its graph fit; raises WeightsError where they do not."""
    graph = about.get("graph")
    if not isinstance(graph, Mapping) or graph.get("precision") not in PRECISIONS:
        raise WeightsError(f"{path}: its metadata does not say how the graph was written; export the model again")
    if graph.get("opset") != OPSET:
        raise _of_another_opset(path, graph.get("opset"))
    if stored.images is not None and list(stored.images)[1:] != [3, side, side]:
        raise WeightsError(
            f"{path}: the graph takes images {list(stored.images)}, its metadata says {side} px; export the model again"
        )
    if stored.scores is not None and list(stored.scores)[1:] != [len(about["classes"])]:
        raise WeightsError(
            f"{path}: the graph scores {list(stored.scores)[1:]} classes, its metadata names {len(about['classes'])}; "
            "export the model again"
        )
    if graph["precision"] == "int8" and (told := int8_told()):
        warnings.warn(f"{path}: {told}", stacklevel=2)
    return GraphModel(stored.run, side, mean, std)


def _opened(content: bytes, path: Path) -> Stored:
    return _opened_pt2(content) if path.suffix == ".pt2" else _opened_onnx(content, path)


def _opened_pt2(content: bytes) -> Stored:
    texts = _pt2_texts(content)
    if METADATA not in texts:
        return Stored(texts, lambda _: ())
    with _quiet():
        run = torch.export.load(io.BytesIO(content)).module()
    return Stored(texts, torch.no_grad()(run))


def _pt2_texts(content: bytes) -> dict[str, str]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"{damaged} differs from its checksum")
        inside = [name for name in archive.namelist() if name.endswith(f"/extra/{METADATA}")]
        return {METADATA: archive.read(inside[0]).decode()} if inside else {}


def _opened_onnx(content: bytes, path: Path) -> Stored:
    import onnxruntime

    if (opset := _opset(content)) not in (OPSET, None):  # onnxruntime would say where it stumbles, not why
        raise _of_another_opset(path, opset)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # its errors are raised, too
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the cores are torch's meanwhile
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    given = session.get_outputs()
    names = [each.name for each in given]
    if names not in (list(OUTPUTS), list(OUTPUTS[:1])):
        raise WeightsError(f"{path} is not a model that mcar export wrote: its outputs are {', '.join(names)}")

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(each) for each in session.run(None, {INPUT: images.cpu().numpy()})]

    texts = session.get_modelmeta().custom_metadata_map
    return Stored(texts, run, session.get_inputs()[0].shape, given[0].shape)


def _of_another_opset(path: Path, opset: object) -> WeightsError:
    return WeightsError(f"{path}: opset {opset!r}, wanted {OPSET}; export the model again")


def _opset(content: bytes) -> int | None:
    """The opset of a graph's own operators, where the package onnx can say it."""
    if importlib.util.find_spec("onnx") is None:
        return None
    import onnx

    graph = onnx.load_model_from_string(content)
    return next((each.version for each in graph.opset_import if each.domain in ("", "ai.onnx")), None)


def _onnx_texts(content: bytes) -> dict[str, str]:
    _require("onnx", "looking into a graph")
    import onnx

    return {each.key: each.value for each in onnx.load_model_from_string(content).metadata_props}

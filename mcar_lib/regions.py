"""The multi-class attentional region module: class maps in, a few boxes and crops out. It has no parameters.

Notation of the paper: B images of H x W pixels, K classes, N regions an image, tau the localisation threshold. Its
steps: 1 class attentional maps, 2 the N classes, 3 the two marginals of each map, 4 an interval of each marginal, 5 the
crops. Everything is one tensor expression over batch and regions; nothing reads a value back from the device.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from mcar_lib.errors import ConfigError

Selection = Literal["top", "bottom", "random"]
SELECTIONS: tuple[Selection, ...] = get_args(Selection)
BoxSource = Literal["maps", "other photo", "corners", "random boxes"]
BOX_SOURCES: tuple[BoxSource, ...] = get_args(BoxSource)

# An interval covers at least an eighth of its side, and the middle three quarters when nothing can be localised.
MARGIN = 0.125


class Regions(NamedTuple):
    """What the module found: boxes (B, N, 4) int64 as x1 y1 x2 y2, half-open, in pixels of the network input;
    classes (B, N) int64, the class whose map gave each box; scores (B, N), that class's global score."""

    boxes: Tensor
    classes: Tensor
    scores: Tensor


def locate_intervals(marginals: Tensor, threshold: float | Tensor) -> Tensor:
    """The interval of each marginal that the released code would choose (step 4): here tau acts.

    marginals: (R, L) float, each scaled to [0, 1]; threshold: tau, a number or one for each row (R,).
    Returns (R, 2) int64, [start, end) with 0 <= start < end <= L for every L above 8 (below, one may be empty). In a
    row with a NaN the first segment wins.
    Raises ConfigError unless marginals is 2-D with L >= 2.
    Source: the release's interval rule, including its half-open ends: a run above tau that begins at z + 1 gives a
    segment that begins at z. Its length test aims at ceil(L / 8), yet leaves some intervals shorter; so does this.
    """
    if marginals.dim() != 2 or marginals.shape[1] < 2:
        raise ConfigError(f"marginals must have shape (R, L) with L >= 2, not {tuple(marginals.shape)}")
    rows, length = marginals.shape
    # Filled in on the device: a number that is copied there would make it wait.
    tau = threshold.to(marginals) if isinstance(threshold, Tensor) else marginals.new_full((), threshold)
    above = torch.sign(marginals - tau.reshape(-1, 1))  # (R, L) in {-1, 0, +1}

    # A breakpoint z is a step across tau from z to z + 1; a segment runs from one breakpoint to the next.
    is_break = F.pad((above[:, 1:] - above[:, :-1]).abs() == 2, (0, 1))  # (R, L)
    position = torch.arange(length, device=marginals.device).expand(rows, length)
    segment = is_break.cumsum(dim=1)  # (R, L), of each position; a breakpoint begins its own
    # bounds[:, s] is where segment s begins. Positions that are no breakpoint go where nothing is read, each elsewhere.
    bounds = F.pad(marginals.new_full((rows, 2 * length), length, dtype=torch.int64), (1, 0))
    bounds = bounds.scatter(1, torch.where(is_break, segment, position + length + 1), position)
    segment_start, segment_end = bounds.gather(1, segment), bounds.gather(1, segment + 1)

    # Of the segments that hold the largest value the longest wins, then the first in the release's order:
    # [0, z_first), [z_last, L), then those between. Each position carries the key of its own segment.
    order = torch.where(segment == 0, 0, torch.where(segment_end == length, 1, segment_start + 2))
    key = (segment_end - segment_start) * (length + 2) - order
    is_peak = marginals == marginals.amax(dim=1, keepdim=True)
    winner = torch.where(is_peak, key, -1).argmax(dim=1, keepdim=True)
    start, end = segment_start.gather(1, winner)[:, 0], segment_end.gather(1, winner)[:, 0]

    nothing = ~is_break.any(dim=1)
    start = torch.where(nothing, math.ceil(MARGIN * length), start)
    end = torch.where(nothing, math.ceil((1 - MARGIN) * length), end)
    return torch.stack(_widen(start, end, length), dim=1)


def _widen(start: Tensor, end: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The release's three length tests, each on what the one before it left."""
    minimum = math.ceil(MARGIN * length)
    pad = minimum - (end - start)
    short = pad >= 0
    half = (pad + 1) // 2  # ceil(pad / 2)

    inside = short & (start > half) & (length - end > pad)
    start, end = torch.where(inside, start - half + 1, start), torch.where(inside, end + half, end)
    at_start = short & (start < half)
    start, end = torch.where(at_start, 0, start), torch.where(at_start, minimum, end)
    at_end = short & (length - end < half)
    start, end = torch.where(at_end, length - minimum + 1, start), torch.where(at_end, length, end)
    return start, end


def select_classes(
    scores: Tensor, num_regions: int, selection: Selection = "top", generator: torch.Generator | None = None
) -> Tensor:
    """The N classes of each image whose maps are searched (step 2): the highest, the lowest or random ones.

    scores: (B, K). Returns (B, N) int64; among equal scores the lower class index comes first.
    Raises ConfigError if N is below 1 or above K, or the selection is unknown.
    """
    check_num_regions(num_regions, scores.shape[1])
    check_selection(selection)
    if selection == "random":
        # Drawn where the generator lives, so that a seed means the same classes on a CPU and on a GPU.
        drawn_on = scores.device if generator is None else generator.device
        scores = torch.rand(scores.shape, generator=generator, device=drawn_on).to(scores.device)
    order = torch.argsort(scores, dim=1, descending=selection != "bottom", stable=True)
    return order[:, :num_regions]


def class_marginals(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Marginals of attention maps (..., H, W) (step 3): px (..., W), the maximum over rows, and py (..., H), that over
    columns, each scaled to [0, 1] by its own minimum and maximum (a constant one is divided by its maximum instead)."""
    return _scale(maps.amax(dim=-2)), _scale(maps.amax(dim=-1))


def _scale(marginal: Tensor) -> Tensor:
    low, high = marginal.amin(dim=-1, keepdim=True), marginal.amax(dim=-1, keepdim=True)
    return torch.where(high > low, (marginal - low) / (high - low), marginal / high)


def attention_maps(class_logits: Tensor, classes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Attention maps of the chosen classes only (step 1): sigmoid, then bilinear upsampling with aligned corners.

    class_logits: (B, K, h, w) float; classes: (B, N) int64; image_size: (H, W). Returns (B, N, H, W) in [0, 1].
    """
    chosen = classes[:, :, None, None].expand(-1, -1, *class_logits.shape[-2:])
    maps = torch.sigmoid(class_logits.gather(1, chosen))
    return F.interpolate(maps, size=image_size, mode="bilinear", align_corners=True)


@torch.no_grad()
def attentional_regions(
    class_logits: Tensor,
    scores: Tensor,
    image_size: tuple[int, int],
    num_regions: int = 4,
    threshold: float = 0.5,
    selection: Selection = "top",
    generator: torch.Generator | None = None,
) -> Regions:
    """From class maps to the boxes of N regions an image (steps 1 to 4 of the paper's module).

    class_logits: (B, K, h, w) float, the 1x1 convolution over the feature map, before the sigmoid;
    scores: (B, K) global scores; image_size: (H, W) of the network input; threshold: tau in (0, 1).
    Returns Regions. Raises ConfigError on a bad N, tau, selection or shape.
    Source: the paper's module, checked against outputs of the released code.
    """
    check_threshold(threshold)
    if class_logits.dim() != 4 or scores.shape != class_logits.shape[:2]:
        raise ConfigError(
            f"class_logits (B, K, h, w) and scores (B, K) do not fit: "
            f"{tuple(class_logits.shape)} and {tuple(scores.shape)}"
        )
    classes = select_classes(scores, num_regions, selection, generator)  # (B, N)
    px, py = class_marginals(attention_maps(class_logits.float(), classes, image_size))  # (B, N, W), (B, N, H)
    x = locate_intervals(px.flatten(0, 1), threshold).view(*classes.shape, 2)
    y = locate_intervals(py.flatten(0, 1), threshold).view(*classes.shape, 2)
    boxes = torch.stack((x[..., 0], y[..., 0], x[..., 1], y[..., 1]), dim=-1)  # (B, N, 4)
    return Regions(boxes, classes, scores.gather(1, classes))


@torch.no_grad()
def control_boxes(
    boxes: Tensor, source: BoxSource, image_size: tuple[int, int], generator: torch.Generator | None = None
) -> Tensor:
    """Boxes (B, N, 4) in place of the module's, to ask what a second look gains that is not at the image's own regions.

    source: "other photo": the boxes of the next image of the batch; "corners": the four corner windows of three
    quarters of each side, then the middle one, then again from the first; "random boxes": corners drawn uniformly,
    sides of at least an eighth. "maps" leaves them.
    Source: this project's; the paper has no such control.
    """
    if source == "maps":
        return boxes
    if source == "other photo":
        return boxes.roll(-1, 0)
    size = torch.tensor(image_size[::-1], device=boxes.device)  # W, H
    if source == "corners":
        sixteenth = torch.tensor([[0, 0], [4, 0], [0, 4], [4, 4], [2, 2]], device=boxes.device)  # x, y of the windows
        low = sixteenth[torch.arange(boxes.shape[1], device=boxes.device) % 5] * size // 16
        return torch.cat((low, low + size * 12 // 16), dim=-1).expand_as(boxes)
    drawn_on = boxes.device if generator is None else generator.device
    drawn = torch.rand((2, *boxes.shape[:2], 2), generator=generator, device=drawn_on).to(boxes.device)
    least = -(-size // 8)
    length = least + (drawn[0] * (size - least + 1)).long().minimum(size - least)
    low = (drawn[1] * (size - length + 1)).long().minimum(size - length)
    return torch.cat((low, low + length), dim=-1)


def check_num_regions(num_regions: int, num_classes: int) -> None:
    """Raises ConfigError unless there are at least as many classes as regions, and a region."""
    if not 1 <= num_regions <= num_classes:
        raise ConfigError(f"num_regions is {num_regions}; it must lie in 1 .. {num_classes}, the number of classes")


def check_selection(selection: str) -> None:
    """Raises ConfigError unless the selection is one of SELECTIONS."""
    if selection not in SELECTIONS:
        raise ConfigError(f"selection is {selection!r}; choose one of {', '.join(SELECTIONS)}")


def check_threshold(threshold: float) -> None:
    """Raises ConfigError unless tau lies strictly between 0 and 1."""
    if not 0 < threshold < 1:
        raise ConfigError(f"threshold (tau) is {threshold}; it must lie strictly between 0 and 1")


@torch.no_grad()
def crop_regions(images: Tensor, boxes: Tensor, size: int | None = None) -> Tensor:
    """Crops every box and resizes it to the size of the input, bilinearly with aligned corners (step 5).

    images: (B, 3, H, W) float; boxes: (B, N, 4) int64 x1 y1 x2 y2, half-open. Returns (B*N, 3, H, W), the regions of
    one image next to one another, in the images' memory format; size: squares of this side in place of H x W. No
    gradient flows to the images. Source: the release's crop and upsampling; the release has no size.
    """
    (batch, channels, *image_size), num_regions = images.shape, boxes.shape[1]
    height, width = (size, size) if size else image_size
    x1, y1, x2, y2 = boxes.to(torch.float32).unbind(-1)  # each (B, N)
    x = _sample_points(x1, x2, image_size[1], width)  # (B, N, W)
    y = _sample_points(y1, y2, image_size[0], height)  # (B, N, H)
    # All x, then all y: sampling reads such a grid as fast as one of pairs, and it is written several times faster.
    planes = torch.stack(
        (
            x[:, :, None, :].expand(-1, -1, height, -1),
            y[:, :, :, None].expand(-1, -1, -1, width),
        ),
        dim=1,
    )  # (B, 2, N, H, W)
    grid = planes.permute(0, 2, 3, 4, 1)  # (B, N, H, W, 2)
    # Threads share the images of a batch, so a single one stands there N times, without a copy. A graph that is being
    # exported is for any batch.
    if not torch.compiler.is_exporting() and batch == 1:
        crops = F.grid_sample(images.float().expand(num_regions, -1, -1, -1), grid[0], align_corners=True)[None]
    else:
        # The regions of an image are sampled as one tall picture, so the image itself is never copied N times.
        tall = F.grid_sample(images.float(), grid.flatten(1, 2), align_corners=True)  # (B, 3, N*H, W)
        crops = tall.view(batch, channels, num_regions, height, width).transpose(1, 2)
    return _side_by_side(crops, _is_channels_last(images))


def _is_channels_last(images: Tensor) -> bool:
    """Whether the channels of each pixel of (B, 3, H, W) lie next to one another."""
    return images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()


def _side_by_side(crops: Tensor, channels_last: bool) -> Tensor:
    """(B, N, 3, H, W) -> (B*N, 3, H, W) in either memory format, by one copy at most."""
    if not channels_last:
        return crops.flatten(0, 1).contiguous()
    return crops.permute(0, 1, 3, 4, 2).contiguous().flatten(0, 1).permute(0, 3, 1, 2)


def _sample_points(start: Tensor, end: Tensor, length: int, count: int) -> Tensor:
    """So many aligned-corner sample positions of [start, end) in grid_sample's coordinates, where 0 .. length-1 is
    -1 .. 1."""
    steps = torch.linspace(0, 1, count, device=start.device)
    pixels = start[..., None] + steps * (end - 1 - start)[..., None]
    return pixels * (2 / (length - 1)) - 1

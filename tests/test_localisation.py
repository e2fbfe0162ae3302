"""Regions against annotated boxes: hand-made cases, plain loops, the model's own regions, and the record of a run."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from mcar_lib.attribution import ClassMaps, maps_of, occlusion, occlusion_maps
from mcar_lib.data.image_set import Boxes, ImageSet
from mcar_lib.data.squares import ResizedImages
from mcar_lib.errors import ConfigError, DataError
from mcar_lib.localisation import (
    F1,
    FOUND,
    MEASURES,
    MIDDLE,
    PEAK,
    POINTING,
    POINTS,
    TAUS,
    ClassRegions,
    Key,
    Objects,
    annotated_objects,
    class_regions,
    image_sums,
    matched_regions,
    measure_overlaps,
    overlap_measures,
    pointing_game,
    val_grid,
)
from mcar_lib.model import MCAR
from mcar_lib.regions import attention_maps
from mcar_lib.training import network_input

Annotation = tuple[list[int], int, bool]  # box, class, difficult


def photos(folder: Path, sizes: list[tuple[int, int]], annotations: list[list[Annotation]] | None) -> ImageSet:
    """Photos of these (width, height) with these objects; None for a data set without boxes."""
    paths = tuple(folder / f"{index}.png" for index in range(len(sizes)))
    for path, size in zip(paths, sizes, strict=True):
        Image.new("RGB", size).save(path)

    def read_boxes(index: int) -> Boxes:
        assert annotations is not None
        boxes = torch.tensor([box for box, _, _ in annotations[index]]).reshape(-1, 4)
        classes = torch.tensor([kind for _, kind, _ in annotations[index]], dtype=torch.int64)
        return Boxes(boxes, classes, torch.tensor([hard for _, _, hard in annotations[index]], dtype=torch.bool))

    ids = tuple(path.stem for path in paths)
    targets = torch.zeros((len(ids), 3), dtype=torch.int8)
    return ImageSet("photos", "test", ("a", "b", "c"), ids, paths, targets, read_boxes if annotations else None)


def objects_of(boxes: list[list[float]], classes: list[int], images: list[int], size: int = 64) -> Objects:
    corners = torch.tensor(boxes, dtype=torch.float64)
    sides = (corners[:, 2:] - corners[:, :2]).prod(dim=1).sqrt() / size
    return Objects(corners, torch.tensor(classes), torch.tensor(images), sides)


def found_in(images: int, classes: int, size: int = 64, seed: int = 0) -> ClassRegions:
    """Random regions and points for every class."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(0, size // 2, (images, classes, 2), generator=generator)
    sides = torch.randint(1, size // 2, (images, classes, 2), generator=generator)
    points = torch.rand((2, images, classes, 2), generator=generator).double() * size
    scores = torch.rand((images, classes), generator=generator)
    return ClassRegions(scores, torch.cat((corners, corners + sides), dim=2), points[0], points[1], size)


def random_objects(count: int, images: int, classes: int, size: int = 64, seed: int = 1) -> Objects:
    generator = torch.Generator().manual_seed(seed)
    corners = torch.rand((count, 2), generator=generator) * size / 2
    sides = 1 + torch.rand((count, 2), generator=generator) * (size / 2 - 1)
    kinds = torch.randint(0, classes, (count,), generator=generator)
    where = torch.randint(0, images, (count,), generator=generator)
    return objects_of(torch.cat((corners, corners + sides), dim=1).tolist(), kinds.tolist(), where.tolist(), size)


def column(measured: Tensor, name: str) -> Tensor:
    return measured[..., MEASURES.index(name)]


OWN = "found at 0.3, own class"


# ---- objects


def test_boxes_are_scaled_with_the_photo_to_the_square(tmp_path: Path) -> None:
    images = photos(tmp_path, [(200, 100)], [[([20, 10, 120, 60], 2, False)]])
    objects = annotated_objects(images, 64)
    torch.testing.assert_close(objects.boxes, torch.tensor([[6.4, 6.4, 38.4, 38.4]], dtype=torch.float64))
    assert objects.classes.tolist() == [2]


def test_size_of_an_object_is_the_root_of_its_share_of_the_photo(tmp_path: Path) -> None:
    images = photos(tmp_path, [(200, 100)], [[([20, 10, 120, 60], 2, False)]])
    assert annotated_objects(images, 64).sizes.tolist() == pytest.approx([0.5])


def test_difficult_objects_are_left_out_and_images_keep_their_index(tmp_path: Path) -> None:
    annotations = [[([0, 0, 8, 8], 0, True), ([2, 2, 6, 6], 1, False)], [], [([0, 0, 4, 4], 2, False)]]
    objects = annotated_objects(photos(tmp_path, [(8, 8)] * 3, annotations), 8)
    assert objects.classes.tolist() == [1, 2]
    assert objects.images.tolist() == [0, 2]


def test_a_data_set_without_boxes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="photos test has no boxes"):
        annotated_objects(photos(tmp_path, [(8, 8)], None), 8)


def test_a_data_set_with_difficult_objects_only_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no annotated object that is not difficult"):
        annotated_objects(photos(tmp_path, [(8, 8)], [[([0, 0, 8, 8], 0, True)]]), 8)


def test_a_photo_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    images = photos(tmp_path, [(8, 8)], [[([0, 0, 8, 8], 0, False)]])
    images.paths[0].write_text("no photo")
    with pytest.raises(DataError, match=r"0\.png"):
        annotated_objects(images, 8)


# ---- regions of every class


@pytest.fixture(scope="module")
def contrasted(tiny_model: Callable[..., MCAR]) -> Callable[..., MCAR]:
    """Builds an untrained model whose boxes do not hang on the last bit of its maps: they have contrast, and between
    their few cells a marginal is a straight line from pixel to pixel, which can meet a tau of 1/2 exactly."""

    def build(**options: object) -> MCAR:
        model = tiny_model(num_regions=5, threshold=0.47, **options).eval()
        with torch.no_grad():
            model.convclass.weight *= 300
        return model

    return build


@pytest.fixture(scope="module")
def eval_model(contrasted: Callable[..., MCAR]) -> MCAR:
    return contrasted()


@pytest.fixture(scope="module")
def found(eval_model: MCAR, scene_squares: tuple[ResizedImages, ResizedImages]) -> ClassRegions:
    return class_regions(maps_of(eval_model, scene_squares[1]), eval_model.threshold)


@pytest.mark.parametrize("selection", ["top", "bottom"])
def test_regions_of_the_chosen_classes_are_those_of_the_model(
    contrasted: Callable[..., MCAR],
    found: ClassRegions,
    scene_squares: tuple[ResizedImages, ResizedImages],
    selection: str,
) -> None:
    model = contrasted(selection=selection)
    squares = scene_squares[1]
    with torch.no_grad():
        expected = model(network_input(model, torch.stack([squares[i] for i in range(len(squares))]))).regions
    assert torch.equal(found.boxes.gather(1, expected.classes[..., None].expand(-1, -1, 4)), expected.boxes)
    torch.testing.assert_close(torch.sigmoid(found.scores.gather(1, expected.classes)), expected.scores)


def test_peaks_are_where_the_upsampled_maps_are_highest(
    eval_model: MCAR, found: ClassRegions, scene_squares: tuple[ResizedImages, ResizedImages]
) -> None:
    squares, size = scene_squares[1], scene_squares[1].size
    with torch.no_grad():
        x = network_input(eval_model, torch.stack([squares[i] for i in range(4)]))
        maps = attention_maps(
            eval_model.class_logits(eval_model.features(x)), torch.arange(20).expand(4, -1), (size, size)
        )
    for image, kind in itertools.product(range(4), range(20)):
        x_peak, y_peak = found.peaks[image, kind].tolist()
        assert maps[image, kind, int(y_peak), int(x_peak)] == maps[image, kind].max()
        assert (x_peak % 1, y_peak % 1) == (0.5, 0.5)


def test_cells_are_the_centres_of_the_highest_cells(
    eval_model: MCAR, found: ClassRegions, scene_squares: tuple[ResizedImages, ResizedImages]
) -> None:
    with torch.no_grad():
        x = network_input(eval_model, scene_squares[1][0][None])
        logits = eval_model.class_logits(eval_model.features(x))[0]  # (K, 2, 2): cells of 32 pixels
    for kind, (x_cell, y_cell) in enumerate(found.cells[0].tolist()):
        assert logits[kind, int(y_cell) // 32, int(x_cell) // 32] == logits[kind].max()
        assert (x_cell % 32, y_cell % 32) == (16, 16)


def test_batches_do_not_change_what_is_found(
    eval_model: MCAR, found: ClassRegions, scene_squares: tuple[ResizedImages, ResizedImages]
) -> None:
    one_by_one = class_regions(maps_of(eval_model, scene_squares[1], batch_size=3), eval_model.threshold)
    torch.testing.assert_close(one_by_one.scores, found.scores)
    assert torch.equal(one_by_one.boxes, found.boxes)


def test_a_model_in_training_mode_is_refused(
    tiny_model: Callable[..., MCAR], scene_squares: tuple[ResizedImages, ResizedImages]
) -> None:
    with pytest.raises(ConfigError, match="training mode"):
        maps_of(tiny_model().train(), scene_squares[1])


# ---- overlaps


def test_measures_of_one_object_by_number_of_regions() -> None:
    objects = objects_of([[0, 0, 10, 10]], [1], [0])
    boxes = torch.tensor([[[0, 0, 10, 5], [5, 0, 15, 10], [0, 0, 10, 10]]])  # IoU 1/2, 1/3, 1
    measured = overlap_measures(objects, boxes, torch.tensor([[0, 1, 1]]))[0]
    expected = {
        "found at 0.3, any class": [1, 1, 1],
        "found at 0.5, any class": [1, 1, 1],
        "found at 0.3, own class": [0, 1, 1],
        "class taken": [0, 1, 1],
    }
    for name in MEASURES:
        assert column(measured, name).tolist() == expected[name], name


def plain_iou(a: list[float], b: list[float]) -> float:
    width, height = (max(0.0, min(a[at + 2], b[at + 2]) - max(a[at], b[at])) for at in (0, 1))
    areas = ((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return width * height / (sum(areas) - width * height)


def test_overlaps_equal_a_plain_loop() -> None:
    found, objects = found_in(images=6, classes=5), random_objects(40, images=6, classes=5)
    classes = found.scores.argsort(dim=1)
    boxes = found.boxes.gather(1, classes[..., None].expand(-1, -1, 4))
    measured = overlap_measures(objects, boxes, classes)
    for index, (box, kind, image, _) in enumerate(zip(*objects, strict=True)):
        ious = [plain_iou(box.tolist(), region) for region in boxes[image].tolist()]
        same = (classes[image] == kind).tolist()
        for count in range(1, 6):
            own = max(iou if alike else 0.0 for iou, alike in zip(ious[:count], same[:count], strict=True))
            expected = [max(ious[:count]) >= 0.3, max(ious[:count]) >= 0.5, own >= 0.3, any(same[:count])]
            assert measured[index, count - 1].tolist() == expected


def test_a_region_is_matched_once_by_an_object_of_its_class() -> None:
    objects = objects_of([[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30]], [1, 1, 2], [0, 0, 1])
    boxes = torch.tensor([[[0, 0, 10, 10], [0, 0, 10, 10]], [[0, 0, 10, 10], [20, 20, 30, 30]]])
    assert matched_regions(objects, boxes, torch.tensor([[1, 2], [2, 2]])).tolist() == [[1, 1], [0, 1]]


def test_top_takes_the_highest_scores_and_occlusion_its_own_boxes_of_them() -> None:
    boxes = torch.tensor([[[0, 0, 8, 8], [8, 8, 16, 16], [16, 16, 24, 24]]])
    points = torch.zeros(1, 3, 2, dtype=torch.float64)
    found = ClassRegions(torch.tensor([[0.2, 0.9, 0.5]]), boxes, points, points, 64)
    objects = objects_of([[8, 8, 16, 16], [0, 0, 8, 8]], [1, 0], [0, 0])
    measured = measure_overlaps(objects, found, found._replace(boxes=boxes.flip(1)), max_regions=3)
    assert column(measured["top"][0], OWN).tolist() == [[1, 1, 1], [0, 0, 1]]
    assert measured["top"][1].tolist() == [[1, 1, 2]]
    assert column(measured["occlusion"][0], FOUND).tolist() == [[1, 1, 1], [0, 1, 1]]
    assert column(measured["occlusion"][0], OWN).tolist() == [[1, 1, 1], [0, 0, 0]]


def test_random_regions_are_those_of_their_seed() -> None:
    found, objects = found_in(images=6, classes=9), random_objects(40, images=6, classes=9)
    first, again, other = (measure_overlaps(objects, found, found, 4, seed=seed)["random"][0] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_random_regions_are_a_mean_over_draws() -> None:
    found, objects = found_in(images=6, classes=9), random_objects(40, images=6, classes=9)
    taken = column(measure_overlaps(objects, found, found, 4, draws=5)["random"][0], "class taken")
    assert set((5 * taken[:, 0]).round().int().tolist()) > {0, 1}
    torch.testing.assert_close(5 * taken, (5 * taken).round())


def test_with_all_classes_random_ones_are_the_top_ones() -> None:
    found, objects = found_in(images=6, classes=4), random_objects(40, images=6, classes=4)
    measured = measure_overlaps(objects, found, found, max_regions=4)
    for random, top in zip(measured["random"], measured["top"], strict=True):
        torch.testing.assert_close(random[:, 3], top[:, 3])


def test_the_centre_box_covers_the_middle_three_quarters_and_knows_no_class() -> None:
    found = found_in(images=1, classes=4)
    of_objects, matched = measure_overlaps(objects_of([[8, 8, 56, 56]], [2], [0]), found, found, 2)["centre"]
    assert column(of_objects, FOUND).tolist() == [[1, 1]]
    assert of_objects[..., 2:].isnan().all()
    assert matched.isnan().all()


def test_more_regions_than_classes_are_refused() -> None:
    found = found_in(images=2, classes=4)
    with pytest.raises(ConfigError, match="num_regions is 5"):
        measure_overlaps(random_objects(3, images=2, classes=4), found, found, max_regions=5)


# ---- the pointing game


def points_at(peaks: list[list[list[float]]], scores: list[list[float]], size: int = 8) -> ClassRegions:
    points = torch.tensor(peaks, dtype=torch.float64)
    cells = torch.full_like(points, 0.5)
    return ClassRegions(torch.tensor(scores), torch.zeros(*points.shape[:2], 4, dtype=torch.int64), points, cells, size)


def test_a_point_hits_any_box_of_its_class_and_boxes_are_half_open() -> None:
    objects = objects_of([[0, 0, 2, 2], [6, 6, 8, 8], [0, 0, 2, 4], [2.5, 0, 4, 4]], [0, 0, 1, 2], [0, 0, 0, 0], 8)
    found = points_at([[[6.5, 7.5], [2.0, 1.5], [2.5, 0.5]]], [[0.1, 0.2, 0.3]])
    assert pointing_game(objects, found, found).hits[:, 0].tolist() == [1, 0, 1]


def test_references_of_the_pointing_game() -> None:
    objects = objects_of([[0, 0, 4, 4], [2, 0, 6, 4], [4, 4, 8, 8]], [0, 0, 1], [0, 0, 0], 8)
    found = points_at([[[7.5, 7.5], [0.5, 0.5]]], [[0.1, 0.2]])
    hits = pointing_game(objects, found, found._replace(cells=found.cells + 7)).hits
    expected = {
        "centre of the highest cell": [1, 0],  # at (0.5, 0.5)
        "highest cell of occlusion": [0, 1],  # at (7.5, 7.5)
        "centre of the image": [0, 1],  # (4, 4) is in the half-open box that begins there only
        "random pixel": [24 / 64, 16 / 64],  # the two boxes overlap
    }
    assert {name: hits[:, POINTS.index(name)].tolist() for name in expected} == expected


def test_ranks_count_from_the_highest_score() -> None:
    objects = objects_of([[0, 0, 4, 4]] * 4, [0, 2, 1, 2], [0, 0, 1, 1], 8)
    found = points_at([[[0.5, 0.5]] * 3] * 2, [[0.1, 0.9, 0.5], [0.7, 0.9, 0.8]])
    pointing = pointing_game(objects, found, found)
    assert list(zip(*(part.tolist() for part in pointing[:3]), strict=True)) == [
        (0, 0, 2),
        (0, 2, 1),
        (1, 1, 0),
        (1, 2, 1),
    ]


# ---- sums of images


def sums_of(objects: Objects, found: ClassRegions, num_regions: int, images: int):
    ways = measure_overlaps(objects, found, found, min(found.scores.shape[1], 8))
    return image_sums(objects, ways, pointing_game(objects, found, found), num_regions, images)


def test_pairs_are_counted_and_those_among_the_top() -> None:
    objects = objects_of([[0, 0, 4, 4], [4, 4, 8, 8]], [0, 1], [0, 0], 8)
    found = points_at([[[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]], [[0.5, 0.4, 0.1]])  # class 0 hits, class 1 misses
    counts, sums = sums_of(objects, found, 1, images=1)
    assert (counts["present"].item(), counts["among the top 1"].item()) == (2, 1)
    assert sums[Key(PEAK, 1, "present", POINTING)] == sums[Key(PEAK, 1, "among the top 1", POINTING)] == 1
    assert sums[Key(MIDDLE, 1, "present", POINTING)] == 1  # (4, 4) is in the second box
    assert sums[Key("random pixel", 1, "present", POINTING)] == 0.5


def test_objects_are_counted_by_size_with_the_lower_end_in() -> None:
    sides = (199, 200, 499, 500)
    objects = objects_of([[0, 0, side, side] for side in sides], [0] * 4, [0] * 4, 1000)
    counts, _ = sums_of(objects, found_in(1, 2, 1000), 1, images=1)
    assert [counts[size].item() for size in ("all", "small", "medium", "large")] == [4, 1, 2, 1]


def test_sums_over_images_are_those_of_their_objects() -> None:
    found, objects = found_in(images=6, classes=5), random_objects(40, images=6, classes=5)
    counts, sums = sums_of(objects, found, 2, images=7)  # the last image has no object
    measured = measure_overlaps(objects, found, found, 5)
    large = objects.sizes >= 0.5
    assert counts["all"].tolist() == objects.images.bincount(minlength=7).tolist()
    for key, kept in (Key("top", 4, "all", FOUND), large >= 0), (Key("random", 2, "large", FOUND), large):
        values = column(measured[key.way][0], FOUND)[kept, key.N - 1]
        assert sums[key].tolist() == pytest.approx(objects.images[kept].bincount(values, minlength=7).tolist())
    assert sums[Key("top", 2, "all", F1)].tolist()[:6] == (2 * measured["top"][1][:, 1]).tolist()
    assert {key.N for key in sums if (key.way, key.among, key.measure) == ("top", "all", FOUND)} == {1, 2, 4}
    assert Key("centre", 2, "all", F1) not in sums  # it belongs to no class


# ---- occlusion


@pytest.fixture
def brightness(tiny_model: Callable[..., MCAR]) -> MCAR:
    """A model whose first class is the more certain the brighter its image, and whose others are never certain."""
    model = tiny_model().eval()
    model.features = torch.nn.AvgPool2d(32)
    model.convclass = torch.nn.Conv2d(3, 20, 1)
    with torch.no_grad():
        model.convclass.weight.zero_()[0] = 1
        model.convclass.bias.zero_()
    return model


def bright_square(x: int, y: int, side: int = 32, size: int = 192) -> Tensor:
    image = torch.full((3, size, size), 117, dtype=torch.uint8)  # about the mean colour
    image[:, y : y + side, x : x + side] = 255
    return image


def test_occlusion_finds_a_bright_square(brightness: MCAR) -> None:
    found = occlusion(brightness, bright_square(4 * 32, 1 * 32))
    assert found.shape == (20, 6, 6)
    assert divmod(int(found[0].argmax()), 6) == (1, 4)
    assert (found[1:] == 0).all()


def test_a_cell_of_occlusion_is_how_far_the_logit_falls(brightness: MCAR) -> None:
    inputs = network_input(brightness, bright_square(3 * 32, 2 * 32, 48)[None])
    covered = inputs.clone()
    covered[..., 64:96, 128:160] = 0
    with torch.no_grad():
        whole, less = (brightness.classify(brightness.pool(brightness.features(x)))[0, 0] for x in (inputs, covered))
    found = occlusion(brightness, bright_square(3 * 32, 2 * 32, 48))
    assert found[0, 2, 4].item() == pytest.approx((whole - less).item(), abs=1e-6)
    assert found[0, 2, 4] > 0


def test_regions_of_occlusion_lie_on_the_square_and_a_map_without_rise_falls_back(
    brightness: MCAR, tmp_path: Path
) -> None:
    Image.fromarray(bright_square(4 * 32, 1 * 32, 64).permute(1, 2, 0).numpy()).save(tmp_path / "0.png")
    images = ImageSet("a", "test", ("x",), ("0",), (tmp_path / "0.png",), torch.zeros(1, 1, dtype=torch.int8), None)
    maps = occlusion_maps(brightness, ResizedImages(images, 192), torch.zeros(1, 20))
    found = class_regions(maps, 0.5)
    x1, y1, x2, y2 = found.boxes[0, 0].tolist()
    assert x1 < 160 < x2
    assert y1 < 64 < y2
    assert (x2 - x1) * (y2 - y1) < 192**2 / 4
    assert found.boxes[0, 1].tolist() == [24, 24, 168, 168]
    assert torch.sigmoid(maps.cells[0, 0]).max() == 1


# ---- choice on val


def test_the_grid_holds_f1_of_the_top_regions() -> None:
    cells = torch.full((1, 3, 7, 7), -9.0)
    cells[0, 0, 1, 4], cells[0, 1, 5, 1] = 9.0, 9.0
    maps = ClassMaps(torch.tensor([[3.0, 2.0, 1.0]]), cells, 224)
    x1, y1, x2, y2 = class_regions(maps, 0.7).boxes[0, 0].tolist()
    objects = objects_of([[x1, y1, x2, y2], [0, 0, 4, 4]], [0, 0], [0, 0], 224)
    grid = {(row["way"], row["tau"], row["N"]): row["F1"] for row in val_grid(objects, {"top": maps})}
    assert grid["top", 0.7, 1] == pytest.approx(2 / 3, abs=1e-6)  # one region matched; two objects and a region
    assert grid["top", 0.7, 2] == pytest.approx(2 / 4)
    assert {tau for _, tau, _ in grid} == set(TAUS)

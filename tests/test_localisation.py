"""Regions against annotated boxes: hand-made cases, plain loops, the model's own regions, and the record of a run."""

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mcar_lib.data.image_set import Boxes, ImageSet
from mcar_lib.data.transforms import ResizedImages
from mcar_lib.errors import ConfigError, DataError
from mcar_lib.localisation import (
    MEASURES,
    POINTS,
    ClassRegions,
    Objects,
    annotated_objects,
    boxes_fingerprint,
    class_maps,
    class_regions,
    measure_overlaps,
    measure_regions,
    overlap_measures,
    overlap_rows,
    pointing_game,
    pointing_rows,
)
from mcar_lib.model import MCAR
from mcar_lib.regions import attention_maps
from mcar_lib.runs import RunConfig, Runs
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
    return class_regions(eval_model, scene_squares[1])


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
    one_by_one = class_regions(eval_model, scene_squares[1], batch_size=3)
    torch.testing.assert_close(one_by_one.scores, found.scores)
    assert torch.equal(one_by_one.boxes, found.boxes)


def test_a_model_in_training_mode_is_refused(
    tiny_model: Callable[..., MCAR], scene_squares: tuple[ResizedImages, ResizedImages]
) -> None:
    with pytest.raises(ConfigError, match="training mode"):
        class_regions(tiny_model().train(), scene_squares[1])


# ---- overlaps


def test_measures_of_one_object_by_number_of_regions() -> None:
    objects = objects_of([[0, 0, 10, 10]], [1], [0])
    boxes = torch.tensor([[[0, 0, 10, 5], [5, 0, 15, 10], [0, 0, 10, 10]]])  # IoU 1/2, 1/3, 1
    measured = overlap_measures(objects, boxes, torch.tensor([[0, 1, 1]]))[0]
    expected = {
        "IoU, own class": [0, 1 / 3, 1],
        "found at 0.3, own class": [0, 1, 1],
        "found at 0.5, own class": [0, 0, 1],
        "class taken": [0, 1, 1],
        "IoU, any class": [0.5, 0.5, 1],
        "found at 0.3, any class": [1, 1, 1],
        "found at 0.5, any class": [1, 1, 1],
    }
    for name in MEASURES:
        assert column(measured, name).tolist() == pytest.approx(expected[name]), name


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
            assert column(measured, "IoU, own class")[index, count - 1].item() == pytest.approx(own)
            assert column(measured, "IoU, any class")[index, count - 1].item() == pytest.approx(max(ious[:count]))
            assert column(measured, "class taken")[index, count - 1].item() == any(same[:count])


def test_top_and_bottom_take_the_highest_and_lowest_scores() -> None:
    boxes = torch.tensor([[[0, 0, 8, 8], [8, 8, 16, 16], [16, 16, 24, 24]]])
    points = torch.zeros(1, 3, 2, dtype=torch.float64)
    found = ClassRegions(torch.tensor([[0.2, 0.9, 0.5]]), boxes, points, points, 64)
    measured = measure_overlaps(objects_of([[8, 8, 16, 16], [0, 0, 8, 8]], [1, 0], [0, 0]), found, max_regions=3)
    assert column(measured["top"], "IoU, own class").tolist() == [[1, 1, 1], [0, 0, 1]]
    assert column(measured["bottom"], "IoU, own class").tolist() == [[0, 0, 1], [1, 1, 1]]


def test_random_regions_are_those_of_their_seed() -> None:
    found, objects = found_in(images=6, classes=9), random_objects(40, images=6, classes=9)
    first, again, other = (measure_overlaps(objects, found, 4, seed=seed)["random"] for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_random_regions_are_a_mean_over_draws() -> None:
    found, objects = found_in(images=6, classes=9), random_objects(40, images=6, classes=9)
    taken = column(measure_overlaps(objects, found, 4, draws=5)["random"], "class taken")
    assert set((5 * taken[:, 0]).round().int().tolist()) > {0, 1}
    torch.testing.assert_close(5 * taken, (5 * taken).round())


def test_with_all_classes_the_way_to_choose_does_not_matter() -> None:
    found, objects = found_in(images=6, classes=4), random_objects(40, images=6, classes=4)
    measured = measure_overlaps(objects, found, max_regions=4)
    assert column(measured["top"], "class taken")[:, 3].min() == 1
    torch.testing.assert_close(measured["random"][:, 3], measured["top"][:, 3])
    torch.testing.assert_close(measured["bottom"][:, 3], measured["top"][:, 3])


def test_the_centre_box_covers_the_middle_three_quarters_and_knows_no_class() -> None:
    found = found_in(images=1, classes=4)
    centre = measure_overlaps(objects_of([[8, 8, 56, 56]], [2], [0]), found, max_regions=2)["centre"]
    assert column(centre, "IoU, any class").tolist() == [[1, 1]]
    assert all(column(centre, name).isnan().all() for name in MEASURES if not name.endswith("any class"))


def test_more_regions_than_classes_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_regions is 5"):
        measure_overlaps(random_objects(3, images=2, classes=4), found_in(images=2, classes=4), max_regions=5)


# ---- the pointing game


def points_at(peaks: list[list[list[float]]], scores: list[list[float]], size: int = 8) -> ClassRegions:
    points = torch.tensor(peaks, dtype=torch.float64)
    cells = torch.full_like(points, 0.5)
    return ClassRegions(torch.tensor(scores), torch.zeros(*points.shape[:2], 4, dtype=torch.int64), points, cells, size)


def test_a_point_hits_any_box_of_its_class_and_boxes_are_half_open() -> None:
    objects = objects_of([[0, 0, 2, 2], [6, 6, 8, 8], [0, 0, 2, 4], [2.5, 0, 4, 4]], [0, 0, 1, 2], [0, 0, 0, 0], 8)
    found = points_at([[[6.5, 7.5], [2.0, 1.5], [2.5, 0.5]]], [[0.1, 0.2, 0.3]])
    assert pointing_game(objects, found).hits[:, 0].tolist() == [1, 0, 1]


def test_references_of_the_pointing_game() -> None:
    objects = objects_of([[0, 0, 4, 4], [2, 0, 6, 4], [4, 4, 8, 8]], [0, 0, 1], [0, 0, 0], 8)
    hits = pointing_game(objects, points_at([[[7.5, 7.5], [0.5, 0.5]]], [[0.1, 0.2]])).hits
    expected = {
        "centre of the highest cell": [1, 0],  # at (0.5, 0.5)
        "centre of the image": [0, 1],  # (4, 4) is in the half-open box that begins there only
        "random pixel": [24 / 64, 16 / 64],  # the two boxes overlap
    }
    assert {name: hits[:, POINTS.index(name)].tolist() for name in expected} == expected


def test_ranks_count_from_the_highest_score() -> None:
    objects = objects_of([[0, 0, 4, 4]] * 4, [0, 2, 1, 2], [0, 0, 1, 1], 8)
    found = points_at([[[0.5, 0.5]] * 3] * 2, [[0.1, 0.9, 0.5], [0.7, 0.9, 0.8]])
    pointing = pointing_game(objects, found)
    assert list(zip(*(part.tolist() for part in pointing[:3]), strict=True)) == [
        (0, 0, 2),
        (0, 2, 1),
        (1, 1, 0),
        (1, 2, 1),
    ]


def test_pointing_rows_tell_all_classes_and_those_among_the_top() -> None:
    objects = objects_of([[0, 0, 4, 4], [4, 4, 8, 8]], [0, 1], [0, 0], 8)
    found = points_at([[[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]]], [[0.5, 0.4, 0.1]])  # class 0 hits, class 1 misses
    rows = {(row["classes"], row["point"]): row for row in pointing_rows(pointing_game(objects, found), 1, 1)}
    assert (rows["present", "peak of the map"]["mean"], rows["present", "peak of the map"]["pairs"]) == (0.5, 2)
    assert rows["present", "peak - random pixel"]["mean"] == 0.25
    assert rows["present", "peak - centre of the image"]["mean"] == 0  # (4, 4) is in the second box
    assert rows["present", "cell - random pixel"]["mean"] == 0.25
    assert rows["present", "cell - centre of the image"]["mean"] == 0
    assert rows["among the top 1", "peak of the map"]["mean"] == 1
    assert rows["among the top 1", "peak - random pixel"]["mean"] == 0.75


# ---- rows


def test_objects_are_binned_by_size_with_the_lower_end_in() -> None:
    objects = objects_of(
        [[0, 0, 199, 199], [0, 0, 200, 200], [0, 0, 499, 499], [0, 0, 500, 500]], [0] * 4, [0] * 4, 1000
    )
    rows = overlap_rows(objects, measure_overlaps(objects, found_in(1, 2, 1000), 1), [1], num_images=1, num_resamples=5)
    counts = {row["size"]: row["objects"] for row in rows}
    assert counts == {"all": 4, "small": 1, "medium": 2, "large": 1}


def test_rows_hold_means_by_number_of_regions_and_paired_differences() -> None:
    found, objects = found_in(images=6, classes=5), random_objects(40, images=6, classes=5)
    measured = measure_overlaps(objects, found, max_regions=4)
    rows = overlap_rows(objects, measured, [2, 4], num_images=6, num_resamples=50)
    means = {(row["regions"], row["N"], row["measure"]): row["mean"] for row in rows if row["size"] == "all"}
    for way, count, name in itertools.product(("top", "bottom", "random"), (2, 4), MEASURES):
        assert means[way, count, name] == pytest.approx(column(measured[way], name)[:, count - 1].mean().item())
    for count in (2, 4):
        measure = "found at 0.3, any class"
        expected = means["top", count, measure] - means["random", count, measure]
        assert means["top - random", count, measure] == pytest.approx(expected)
        assert np.isnan(means["top - centre", count, "IoU, own class"])


def test_ways_that_take_the_same_regions_differ_by_nothing() -> None:
    found, objects = found_in(images=30, classes=5), random_objects(200, images=30, classes=5)
    measured = measure_overlaps(objects, found, max_regions=5)
    rows = overlap_rows(objects, measured, [5], num_images=30)  # all classes: the same regions, so no difference
    (row,) = (
        r for r in rows if (r["regions"], r["size"], r["measure"]) == ("top - random", "all", "found at 0.3, any class")
    )
    assert (row["mean"], row["low"], row["high"]) == (0, 0, 0)


# ---- the record of a run


def test_the_record_is_made_once_and_found_by_its_run(
    runs: Runs, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = measure_regions(runs, tiny_config)
    monkeypatch.delattr("mcar_lib.localisation.class_regions")
    assert repr(measure_regions(runs, tiny_config)) == repr(made)
    assert made["run_id"] == runs.run(tiny_config).run_id


def test_the_record_counts_what_it_measured(runs: Runs, tiny_config: RunConfig) -> None:
    record, test = measure_regions(runs, tiny_config), runs.data(tiny_config).test
    difficult = torch.cat([test.boxes(index).difficult for index in range(len(test))])
    assert (record["data"], record["images"], record["difficult"]) == (test.title, len(test), difficult.sum())
    assert list(record["objects"]) == ["small", "medium", "large"]
    assert sum(record["objects"].values()) == (~difficult).sum()
    assert {row["N"] for row in record["overlap"]} == {1, 2, 4, 6, 8}


def test_the_gallery_has_the_boxes_and_maps_of_the_model(runs: Runs, tiny_config: RunConfig) -> None:
    entry = measure_regions(runs, tiny_config)["gallery"][1]
    mcar, test = runs.trained_model(tiny_config), runs.data(tiny_config).test
    squares = runs.splits.squares(test, tiny_config.image_size)
    images = torch.stack([squares[at] for at in range(4)])
    with torch.no_grad():
        found = mcar(network_input(mcar, images)).regions
    chosen = found.classes[1].tolist()
    assert entry["image"] == test.ids[1]
    assert entry["labels"] == [test.classes[k] for k in chosen]
    assert entry["boxes"] == found.boxes[1].tolist()
    expected = torch.sigmoid(class_maps(mcar, images)[1][1, chosen])
    torch.testing.assert_close(torch.tensor(entry["cells"]), expected, rtol=1e-3, atol=1e-4)


def test_a_record_of_other_boxes_is_made_anew(runs: Runs, tiny_config: RunConfig) -> None:
    record = measure_regions(runs, tiny_config)
    assert record["boxes"] == boxes_fingerprint(runs.data(tiny_config).test)
    (path,) = (runs.local_folder / "regions").glob("*.json")
    path.write_text(json.dumps({**record, "boxes": "others", "images": 0}))
    assert measure_regions(runs, tiny_config)["images"] == record["images"]


@pytest.mark.parametrize("change", ["corner", "class", "difficult"])
def test_the_fingerprint_of_boxes_holds_all_of_each(change: str) -> None:
    kept = Boxes.of([[0, 0, 4, 4]], [0], [False])
    other = Boxes.of([[0, 0, 4, 5 if change == "corner" else 4]], [int(change == "class")], [change == "difficult"])
    images = [
        ImageSet("a", "test", ("cat", "dog"), ("1",), (Path("1"),), torch.zeros(1, 2), lambda _, boxes=boxes: boxes)
        for boxes in (kept, other)
    ]
    assert boxes_fingerprint(images[0]) != boxes_fingerprint(images[1])


def test_without_boxes_the_record_holds_the_gallery_alone(
    runs: Runs, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = runs.data(tiny_config)
    bare = dataclasses.replace(data, scored=dataclasses.replace(data.test, read_boxes=None))
    monkeypatch.setattr(runs, "data", lambda config=None: bare)
    record = measure_regions(runs, tiny_config)
    assert (record["overlap"], record["pointing"], record["objects"]) == ([], [], {})
    assert [entry["annotated"] for entry in record["gallery"]] == [[]] * 4
    assert all(entry["boxes"] for entry in record["gallery"])

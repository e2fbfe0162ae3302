"""The square resize, the augmentation and the normalisation, against PIL, torchvision and plain numbers."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance
from torch import Tensor
from torchvision.transforms import v2

from mcar_lib.backbones import IMAGENET_MEAN, IMAGENET_STD
from mcar_lib.data.image_set import ImageSet
from mcar_lib.data.squares import ResizedImages
from mcar_lib.data.transforms import crop_and_flip, jitter_colours, normalise, resize_square, sample_generator

# Computed apart from the library: sha256sum of "0/0/0" and "7/59/5010", its first 8 bytes halved.
GOLDEN_SEEDS = [3051931488724851722, 2739853573439836556]


def noise(height: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def from_pil(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def augment(image: Tensor, generator: torch.Generator, flip: bool = True, jitter: float = 0.3) -> Tensor:
    """One image (3, S, S) as training has it."""
    image, colours = crop_and_flip(image, generator, flip, jitter)
    return image if jitter == 0 else jitter_colours(image[None], *(each[None] for each in colours))[0]


def largest_difference(one: Tensor, other: Tensor) -> int:
    return int((one.int() - other.int()).abs().max())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(2, 150))
def test_resize_square_is_pils_bilinear_resize(height: int, width: int, size: int) -> None:
    image = noise(height, width)
    ours = resize_square(image, size)
    pil = from_pil(to_pil(image).resize((size, size), Image.Resampling.BILINEAR))
    assert ours.shape == (3, size, size)
    assert ours.dtype == torch.uint8
    assert largest_difference(ours, pil) <= 2  # each rounds twice, after rows and after columns


@pytest.mark.parametrize("seed", range(12))
def test_augment_is_what_pil_does_with_the_same_draws(seed: int) -> None:
    image = noise(20, 20, seed) // 2 + 40
    generator = sample_generator(seed, 0, 0)
    flipped = torch.rand((), generator=generator).item() < 0.5
    order = torch.randperm(3, generator=generator).tolist()
    factors = (0.7 + 0.6 * torch.rand(3, generator=generator)).tolist()
    expected = to_pil(image.flip(2) if flipped else image)
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for which in order:
        expected = enhancers[which](expected).enhance(factors[which])
    ours = augment(image, sample_generator(seed, 0, 0), flip=True, jitter=0.3)
    assert largest_difference(ours, from_pil(expected)) <= 3  # PIL rounds its means and greys at every step


def test_augment_flips_half_of_the_images() -> None:
    image = noise(4, 4)
    outcomes = [augment(image, sample_generator(0, 0, index), flip=True, jitter=0.0) for index in range(1000)]
    flipped = [torch.equal(outcome, image.flip(2)) for outcome in outcomes]
    kept = [torch.equal(outcome, image) for outcome in outcomes]
    assert sum(flipped) + sum(kept) == 1000
    assert 440 <= sum(flipped) <= 560


def test_jitter_factors_fill_their_interval_evenly() -> None:
    gray = torch.full((3, 2, 2), 100, dtype=torch.uint8)  # contrast and saturation leave a plain gray alone
    levels = [
        int(augment(gray, sample_generator(1, 0, index), flip=False, jitter=0.3)[0, 0, 0]) for index in range(1000)
    ]
    assert 67 <= min(levels) <= 71  # each of the three steps rounds down to whole levels
    assert 127 <= max(levels) <= 130
    assert 98 <= sum(levels) / 1000 <= 102


def test_jitter_and_torchvisions_color_jitter_spread_alike() -> None:
    image = noise(8, 8) // 2 + 40
    torch.manual_seed(0)
    theirs = v2.ColorJitter(0.3, 0.3, 0.3)
    reference = torch.stack([theirs(image) for _ in range(600)]).float()
    ours = torch.stack([augment(image, sample_generator(2, 0, i), False, 0.3) for i in range(600)]).float()
    assert (ours.mean(0) - reference.mean(0)).abs().max() < 6
    assert (ours.std(0) - reference.std(0)).abs().max() < 4


def test_no_flip_and_no_jitter_change_nothing() -> None:
    image = noise(5, 5)
    for index in range(8):
        assert torch.equal(augment(image, sample_generator(0, 0, index), flip=False, jitter=0.0), image)


def test_augment_leaves_its_input_and_the_global_generator_alone() -> None:
    image = noise(6, 6)
    before, state = image.clone(), torch.get_rng_state()
    augment(image, sample_generator(0, 0, 0), flip=True, jitter=0.3)
    assert torch.equal(image, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_flip_does_not_depend_on_the_jitter() -> None:
    image = noise(6, 6)
    for index in range(8):
        plain = augment(image, sample_generator(0, 0, index), flip=True, jitter=0.0)
        faint = augment(image, sample_generator(0, 0, index), flip=True, jitter=1e-6)
        assert largest_difference(plain, faint) <= 3  # each of the three steps rounds down to whole levels


def test_sample_generator_is_stable_across_machines_and_sessions() -> None:
    seeds = [sample_generator(0, 0, 0).initial_seed(), sample_generator(7, 59, 5010).initial_seed()]
    assert seeds == GOLDEN_SEEDS


def test_sample_generator_differs_for_every_triple() -> None:
    triples = [(seed, epoch, index) for seed in range(12) for epoch in range(12) for index in range(12)]
    assert len({sample_generator(*triple).initial_seed() for triple in triples}) == len(triples)


def test_normalise_is_the_imagenet_arithmetic() -> None:
    images = torch.stack([noise(3, 4), noise(3, 4, seed=1)])
    result = normalise(images, IMAGENET_MEAN, IMAGENET_STD)
    by_hand = (images.double().numpy() / 255 - np.array(IMAGENET_MEAN).reshape(3, 1, 1)) / np.array(
        IMAGENET_STD
    ).reshape(3, 1, 1)
    assert result.dtype == torch.float32
    np.testing.assert_allclose(result.numpy(), by_hand, atol=1e-5)
    torch.testing.assert_close(result, v2.functional.normalize(images / 255, IMAGENET_MEAN, IMAGENET_STD))


@pytest.fixture
def image_set(tmp_path: Path) -> ImageSet:
    paths = tuple(tmp_path / f"{index}.png" for index in range(5))
    for index, path in enumerate(paths):
        to_pil(noise(20 + index, 30, seed=index)).save(path)
    targets = torch.zeros((5, 1), dtype=torch.int8)
    return ImageSet("made", "test", ("thing",), tuple("abcde"), paths, targets)


def test_resized_images_are_the_same_from_memory_and_from_files(image_set: ImageSet) -> None:
    memory, files = ResizedImages(image_set, 16), ResizedImages(image_set, 16, memory_limit_bytes=0)
    assert memory.kept is not None
    assert files.kept is None
    assert len(memory) == len(files) == 5
    for index in range(5):
        expected = resize_square(image_set[index][0], 16)
        assert torch.equal(memory[index], expected)
        assert torch.equal(files[index], expected)


def test_resized_images_stay_within_the_memory_limit(image_set: ImageSet) -> None:
    need = 5 * 3 * 16 * 16
    assert ResizedImages(image_set, 16, memory_limit_bytes=need).kept is not None
    assert ResizedImages(image_set, 16, memory_limit_bytes=need - 1).kept is None


def test_resized_images_read_each_file_once_and_report_progress(image_set: ImageSet) -> None:
    steps: list[tuple[int, int]] = []
    resized = ResizedImages(image_set, 16, progress=lambda done, total: steps.append((done, total)))
    for path in image_set.paths:
        path.unlink()
    assert resized[4].shape == (3, 16, 16)
    assert steps == [(done, 5) for done in range(1, 6)]


def test_resized_images_of_an_empty_set(image_set: ImageSet) -> None:
    empty = dataclasses.replace(image_set, ids=(), paths=(), targets=torch.zeros((0, 1), dtype=torch.int8))
    assert len(ResizedImages(empty, 16)) == 0

"""Random scores and targets for the tests of metrics and of their intervals."""

import numpy as np


def random_case(num_images, num_classes, prevalence, seed, difficult=0.0, num_seeds=None, skill=0.3):
    """Untied scores in (0, 1) and targets with at least one positive in every class."""
    generator = np.random.default_rng(seed)
    targets = (generator.random((num_images, num_classes)) < prevalence).astype(np.int64)
    targets[generator.random(targets.shape) < difficult] = -1
    targets[generator.integers(num_images, size=num_classes), np.arange(num_classes)] = 1
    shape = targets.shape if num_seeds is None else (num_seeds, *targets.shape)
    return (generator.random(shape) + skill * (targets == 1)) / (1 + skill), targets

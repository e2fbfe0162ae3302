"""Training: the recipe, the loop that fits and evaluates, checkpoints, and the processes that share a run."""

from mcar_lib.data.transforms import network_input
from mcar_lib.training import processes
from mcar_lib.training.checkpoint import CHECKPOINT, PREVIOUS, EpochResult, Fit
from mcar_lib.training.execution import Execution, Standing
from mcar_lib.training.loop import (
    EVALUATION_BATCH,
    SETTINGS,
    check_groups,
    evaluate,
    fit,
    stream_map,
)
from mcar_lib.training.recipe import (
    EPOCH,
    EVALUATION,
    INITIALISATION,
    ORDER,
    Positive,
    Recipe,
    StepLoss,
    StreamScores,
    TrainingBatch,
    TrainingImages,
    batch_scores,
    build_optimizer,
    build_schedule,
    forward_in_groups,
    parameter_groups,
    seed_everything,
    training_step,
)

# fmt: off
__all__ = [
    "CHECKPOINT", "EPOCH", "EVALUATION", "EVALUATION_BATCH", "INITIALISATION", "ORDER", "PREVIOUS", "SETTINGS",
    "EpochResult", "Execution", "Fit", "Positive", "Recipe", "Standing", "StepLoss", "StreamScores",
    "TrainingBatch", "TrainingImages",
    "batch_scores", "build_optimizer", "build_schedule", "check_groups", "evaluate", "fit", "forward_in_groups",
    "network_input", "parameter_groups", "processes", "seed_everything", "stream_map",
    "training_step",
]
# fmt: on

"""What the fine-tuning loop is told."""

from dataclasses import dataclass

CHECKPOINT = "checkpoint.safetensors"  # in the run folder, while the run is not finished


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune.

    Attributes:
        epochs: passes over the training examples.
        batch_size: examples a step.
        learning_rate: the highest, after a warm-up of a tenth of the steps; a cosine takes it to a hundredth.
        weight_decay: of matrices.
        grad_clip: largest norm of the gradient; 0: no clipping.
        seed: of the order, the new weights and dropout.
        evals_per_epoch: measurements on the held-out part each epoch.
        checkpoint_interval: steps between checkpoints; None: at each measurement and every minute.
        track: trackers that get the measurements too, as of `fastgpt.train.track.tracker_names`.
    """

    epochs: int = 3
    batch_size: int = 16
    learning_rate: float = 5e-4
    weight_decay: float = 0.1
    grad_clip: float = 1.0
    seed: int = 1337
    evals_per_epoch: int = 1
    checkpoint_interval: int | None = None
    track: str = ""

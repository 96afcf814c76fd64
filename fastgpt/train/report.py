"""What a run's two losses say: is it still learning, has it settled, does it learn its text by heart, does it fall apart.

The training and the validation loss of metrics.jsonl are of the same weights with dropout off, so the space between them is what the
model knows about its training text alone. They part where the validation loss is lowest and only the training loss falls on.
"""

from collections.abc import Sequence
from typing import Any

from fastgpt.train.checkpoint import TrainState

WIDE_GAP = 0.1  # of the validation loss: a space between the losses that is worth a word
SETTLED = 0.002  # of the validation loss, over the last third of the run


def overfitting_report(lines: Sequence[dict[str, Any]]) -> list[str]:
    """Sentences about a run's losses: what they are, where they part, what to do.

    Args:
        lines: those of metrics.jsonl.

    Example:
        >>> steps = ((0, 4.0, 4.0), (10, 2.0, 2.1), (20, 1.0, 2.4), (30, 0.5, 2.9))
        >>> lines = [{"step": s, "train_loss": t, "val_loss": v} for s, t, v in steps]
        >>> overfitting_report(lines)[1][:77]
        'They part at step 10: from there the training loss fell from 2.0000 to 0.5000'
    """
    if len(lines) < 2:
        return ["There are too few evaluations to say anything: at least two are needed."]
    best = min(range(len(lines)), key=lambda index: lines[index]["val_loss"])
    low, end = lines[best], lines[-1]
    gap = end["val_loss"] - end["train_loss"]
    words = [
        f"At the end, step {end['step']:,}: training loss {end['train_loss']:.4f}, validation loss {end['val_loss']:.4f}, "
        f"{gap:.4f} between them; the best validation loss was {low['val_loss']:.4f} at step {low['step']:,}."
    ]
    rose = end["val_loss"] > low["val_loss"]
    if rose and end["train_loss"] < low["train_loss"]:
        words += [
            f"They part at step {low['step']:,}: from there the training loss fell from {low['train_loss']:.4f} to "
            f"{end['train_loss']:.4f} and the validation loss rose from {low['val_loss']:.4f} to {end['val_loss']:.4f}.",
            f"That is overfitting: the model learns its training text by heart. The weights of step {low['step']:,} are kept. "
            "To go lower: more text (the surest), more dropout or weight decay, a smaller model, or fewer steps.",
        ]
    elif rose:
        words += [
            f"Since step {low['step']:,} both losses rose, the training loss from {low['train_loss']:.4f} to {end['train_loss']:.4f}.",
            "That is no overfitting but unsteady training: a lower learning rate, a longer warm-up or a larger batch usually helps.",
        ]
    else:
        before = lines[len(lines) * 2 // 3 - 1]["val_loss"]
        if before - end["val_loss"] > SETTLED * before:
            words.append(
                f"The validation loss was still falling (from {before:.4f} over the last third of the run): a longer run will go lower."
            )
        else:
            words.append(
                "The validation loss has settled and the run is at its best: only a larger model or more text will go lower."
            )
        if gap > WIDE_GAP * end["val_loss"]:
            words.append(
                f"The training loss is {gap / end['val_loss']:.0%} below the validation loss: the text is small for this model, and "
                "a much longer run will learn it by heart. More text or more dropout would help more."
            )
    return words


def parting(state: TrainState, train_loss: float, val_loss: float) -> str:
    """What a run says while it trains, once its two losses part ways; an empty string where they do not."""
    at_best = state.train_loss_at_best
    if state.evals_without_better < 2 or at_best is None or train_loss >= at_best:
        return ""
    return (
        f"training and validation part ways: since step {state.best_step:,} the training loss fell from {at_best:.4f} to "
        f"{train_loss:.4f} while the validation loss went from {state.best_loss:.4f} to {val_loss:.4f}. The model is learning its "
        "training text by heart; more text, a smaller model or more dropout would help. "
        f"The weights of step {state.best_step:,} are kept."
    )

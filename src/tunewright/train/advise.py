"""Advice: a table of pure rules over what a run shows, each naming a known trouble and its fix.

A rule is a function (plan, history) -> the text to say, or None. The loop asks after each epoch and before the first
step, and says each advice once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from tunewright.train.plan import Plan


@dataclass(frozen=True)
class Epoch:
    """train_loss: mean over the epoch's steps. valid_loss: full_valid_loss at its end, None without validation."""

    step: int
    train_loss: float
    valid_loss: float | None = None


@dataclass(frozen=True)
class History:
    """What is known of a run. usual_rate: the default learning rate of the tuner with the objective.

    alarms: how often the divergence watch spoke, updates were skipped or the job rolled back.
    """

    usual_rate: float
    epochs: list[Epoch] = field(default_factory=list)
    alarms: int = 0


Rule = Callable[[Plan, History], str | None]


def overfitting(plan: Plan, history: History) -> str | None:
    known = [(i, e) for i, e in enumerate(history.epochs, 1) if e.valid_loss is not None]
    if len(known) < 2:
        return None
    best_epoch, best = min(known, key=lambda pair: pair[1].valid_loss or 0.0)
    last = known[-1][1]
    rising = (last.valid_loss or 0.0) > 1.02 * (best.valid_loss or 0.0)
    if not rising or last.train_loss >= best.train_loss:
        return None
    return (
        f"Overfitting: since epoch {best_epoch} the validation loss rose from {best.valid_loss:.3f} to "
        f"{last.valid_loss:.3f} while the training loss fell from {best.train_loss:.3f} to {last.train_loss:.3f}. "
        f"Set n_epochs to {best_epoch}, or early_stopping to 1 (the best checkpoint then becomes the model), or use "
        "more rows, dropout or a smaller rank."
    )


def underfitting(plan: Plan, history: History) -> str | None:
    if len(history.epochs) < max(plan.n_epochs, 2):
        return None
    before, last = history.epochs[-2:]
    # the training loss alone falls as well when rows are learned by heart
    if before.valid_loss is None or last.valid_loss is None or last.valid_loss >= 0.95 * before.valid_loss:
        return None
    return (
        f"Underfitting: in the last epoch the validation loss still fell from {before.valid_loss:.3f} to "
        f"{last.valid_loss:.3f}. Continue from this model, raise n_epochs (now {plan.n_epochs}), or raise the learning "
        f"rate (now {plan.learning_rate:g})."
    )


def learns_nothing(plan: Plan, history: History) -> str | None:
    base = plan.base.get("loss")
    if base is None or len(history.epochs) < plan.n_epochs:
        return None
    last = history.epochs[-1]
    now = last.train_loss if last.valid_loss is None or plan.base.get("source") == "train" else last.valid_loss
    if now < 0.98 * base:
        return None
    return (
        f"Hardly anything was learned: the loss is {now:.3f}, that of the base model was {base:.3f}. Raise the "
        f"learning rate (now {plan.learning_rate:g}, usual {history.usual_rate:g}) or n_epochs (now {plan.n_epochs}), "
        "and look at the loss mask with `tunewright data check`."
    )


def instability(plan: Plan, history: History) -> str | None:
    if history.alarms < 2:
        return None
    return (
        f"Instability: {history.alarms} times the loss or the gradient left its usual range. Lower the learning rate "
        f"(now {plan.learning_rate:g}), raise batch_size (now {plan.batch_size}) or the schedule's warm-up, or look "
        "for rows unlike the others."
    )


def too_few_rows(plan: Plan, history: History) -> str | None:
    if plan.n_rows >= 50:
        return None
    return (
        f"Too few rows: {plan.n_rows}. A style is learned from about 50 to 100 good rows, a skill from several "
        "hundred; with fewer the model mostly learns them by heart. Collect or write more rows."
    )


def unusual_rate(plan: Plan, history: History) -> str | None:
    times = plan.learning_rate / history.usual_rate
    if 0.02 <= times <= 10:
        return None
    way, fix = ("high", "it may destroy what the model knows") if times > 1 else ("low", "it may learn nothing")
    return (
        f"Unusual learning rate: {plan.learning_rate:g} is very {way} for this tuner (usual {history.usual_rate:g}); "
        f"{fix}. Set learning_rate to 'auto' or nearer to that."
    )


def unusual_epochs(plan: Plan, history: History) -> str | None:
    if plan.n_epochs > 10 and plan.n_rows >= 500:
        return (
            f"Unusual number of epochs: {plan.n_epochs} passes over {plan.n_rows} rows; after 2 to 4 a model of this "
            "kind mostly repeats its rows. Lower n_epochs, or give a validation_file and set early_stopping."
        )
    if plan.total_steps < 10:
        return (
            f"Unusually few steps: {plan.total_steps} updates teach little. Raise n_epochs (now {plan.n_epochs}) or "
            f"lower batch_size (now {plan.batch_size})."
        )
    return None


RULES: dict[str, Rule] = {
    "overfitting": overfitting,
    "underfitting": underfitting,
    "learns_nothing": learns_nothing,
    "instability": instability,
    "too_few_rows": too_few_rows,
    "unusual_rate": unusual_rate,
    "unusual_epochs": unusual_epochs,
}


def advise(plan: Plan, history: History) -> dict[str, str]:
    """{name: text} of every rule that has something to say."""
    said = {name: rule(plan, history) for name, rule in RULES.items()}
    return {name: text for name, text in said.items() if text is not None}

"""The divergence watch: a table of rules, each a bound on how far a number may lie above its running median.

A rule speaks after `warn` steps in a row beyond its bound and asks for a roll-back after `act`. Numbers beyond the
bound do not enter the history, so the median stays that of the time before. Both belong to the loop's State, so a
resumed job watches on as if it had never stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Literal

WINDOW = 50
ENOUGH = 10


@dataclass(frozen=True)
class Rule:
    """name: the number it looks at. says: in words. bound: the median -> the largest value that is still ordinary.

    warn, act: after how many steps in a row it speaks, and asks for a roll-back (None: never). advice: what to do.
    """

    name: str
    says: str
    bound: Callable[[float], float]
    warn: int
    act: int | None
    advice: str = "If it goes on, the job rolls back and halves the learning rate."


RULES = (
    Rule("loss", "the loss is far above its median", lambda m: 2 * m + 1, 3, 8),
    Rule("grad_norm", "the gradient's norm is more than 20 times its median", lambda m: 20 * m, 3, 8),
    Rule(
        "kl",
        "the distance from the start (KL, nats a token) explodes",
        lambda m: 10 * m + 1,
        3,
        None,
        "Look at samples.jsonl whether the answers still make sense; a larger kl_coefficient or a lower learning rate "
        "keeps the model closer to the start.",
    ),
    Rule(
        "lost_reward",
        "the mean reward has collapsed (here with the sign turned)",
        lambda m: m / 2 if m < 0 else 1.5 * m + 0.1,
        5,
        None,
        "Look at samples.jsonl what the answers have become; a lower learning rate or a larger kl_coefficient helps.",
    ),
)


@dataclass(frozen=True)
class Alarm:
    """What a rule has to say. first: the first step of the streak."""

    action: Literal["warn", "act"]
    rule: Rule
    value: float
    median: float
    first: int


def of_rollouts(metrics: dict[str, float | None]) -> dict[str, float | None]:
    """What the rules about rollouts look at, from a step's metrics; nothing for any other job."""
    reward = metrics.get("train_mean_reward")
    return {} if reward is None else {"kl": metrics.get("train_kl"), "lost_reward": -reward}


def look(
    history: dict[str, list[float]], streaks: dict[str, int], step: int, values: dict[str, float | None]
) -> list[Alarm]:
    """Enter this step's numbers into history and streaks, and return what the rules say. None is no number."""
    alarms = []
    for rule in RULES:
        value = values.get(rule.name)
        if value is None:
            continue
        past = history.setdefault(rule.name, [])
        usual = median(past) if len(past) >= ENOUGH else None
        if usual is None or value <= rule.bound(usual):
            streaks[rule.name] = 0
            past.append(value)
            del past[:-WINDOW]
            continue
        n = streaks[rule.name] = streaks.get(rule.name, 0) + 1
        if n in (rule.warn, rule.act):
            alarms.append(Alarm("warn" if n == rule.warn else "act", rule, value, usual, step - n + 1))
    return alarms

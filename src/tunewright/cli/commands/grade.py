"""`tunewright grade GRADER ROWS`: what a grader gives answers that exist already, before anything is trained on it."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from tunewright.core.home import Home
    from tunewright.graders.base import Ask, Grade

ANSWERS = ("sample", "completion", "output_text", "text")
BINS, WIDTH, THREADS = 10, 40, 8


def grade(
    grader: Annotated[Path, typer.Argument(help="The grader's object, YAML or JSON.", show_default=False)],
    rows: Annotated[Path, typer.Argument(help="Rows with answers: JSONL, JSON, CSV or Parquet.", show_default=False)],
    limit: Annotated[int | None, typer.Option(min=1, help="Grade the first rows only.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a row.")] = False,
    home: Annotated[Path | None, typer.Option(help="The data folder.", show_default="~/.tunewright")] = None,
) -> None:
    """Say how good the answers in ROWS are.

    The answer is a chat row's last message, else its field sample, completion, output_text or text; what else a row has
    is `item`. The exit code is 1 when some could not be graded.
    """
    from concurrent.futures import ThreadPoolExecutor
    from itertools import islice

    from rich.console import Console

    from tunewright.core.errors import UserError
    from tunewright.core.home import find_home
    from tunewright.graders.base import Sample, Seams, parse_grader

    place = find_home(home)
    found = list(islice(read_answers(rows), limit))
    if not found:
        raise UserError(f"'{rows}' has no rows.")
    fields = {name for _, item, _ in found for name in item}
    with ExitStack() as stack:
        seams = Seams(ask=engine_of(place, stack), cache=place.cache / "answers")
        checked = stack.enter_context(parse_grader(read_spec(grader), fields, seams=seams))
        with ThreadPoolExecutor(THREADS) as pool:
            grades = list(pool.map(lambda row: checked.grade(row[1], Sample(row[2])), found))
    lines = [line for line, _, _ in found]
    if as_json:
        for line, g in zip(lines, grades, strict=True):
            told = {"line": line, "reward": g.reward, "sub_rewards": g.sub_rewards, "errors": g.errors, "why": g.why}
            print(json.dumps(told, ensure_ascii=False))
    else:
        show(rows.name, lines, grades, Console())
    if any(g.errors for g in grades):
        raise typer.Exit(1)


def read_spec(path: Path) -> Any:
    """The object in a YAML or JSON file. Raises UserError."""
    import yaml

    from tunewright.core.errors import UserError

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"The file '{path}' cannot be opened: {e.strerror}.") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"'{path}' is not YAML: {' '.join(str(e).split())[:300]}.") from e


def read_answers(path: Path) -> Iterator[tuple[int, dict[str, Any], str]]:
    """(line, item, answer) of each row. Raises DataError for one without an answer."""
    from tunewright.core.conversation import item_of
    from tunewright.core.errors import DataError, Problem
    from tunewright.data.sources import read_rows

    for line, row in read_rows(path):
        if isinstance(row, Problem):
            raise DataError(str(row), problems=[row])
        messages = row["messages"] if isinstance(row.get("messages"), list) else []
        last = messages[-1] if messages else None
        if isinstance(last, dict) and last.get("role") == "assistant":
            yield line, item_of({**row, "messages": messages[:-1]}), str(last.get("content") or "")
            continue
        item = item_of(row)
        name = next((n for n in ANSWERS if isinstance(row.get(n), str)), None)
        if name is None:
            text = f"has no answer: end its messages with an assistant message, or give it one of {', '.join(ANSWERS)}."
            problem = Problem(line, text)
            raise DataError(f"{path.name} {problem}", problems=[problem])
        own = item.get("item")
        yield line, own if isinstance(own, dict) else {k: v for k, v in item.items() if k != name}, str(row[name])


def engine_of(home: Home, stack: ExitStack) -> Ask:
    """Judges that are models of this machine; the engine starts with the first question."""
    from functools import cache

    from tunewright.cli.commands.chat import find_model
    from tunewright.engine.client import EngineSession
    from tunewright.graders.base import Said

    session = cache(lambda: stack.enter_context(EngineSession(home.ensure())))

    def ask(messages: list[dict[str, Any]], *, model: str, **sent: Any) -> Said:
        sent["max_tokens"] = sent.pop("max_completion_tokens")
        reply = session().reply({**find_model(model, home), "temperature": 0, **sent, "messages": messages})
        return Said(reply.text, reply.usage)

    return ask


def show(name: str, lines: list[int], grades: list[Grade], console: Console) -> None:
    """The mean, how rewards are spread, each part of a `multi`, and what could not be graded."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    rewards = [g.reward for g in grades]
    mean = sum(rewards) / len(rewards)
    spread = math.sqrt(sum((r - mean) ** 2 for r in rewards) / max(len(rewards) - 1, 1))
    error = spread / math.sqrt(len(rewards))
    say(
        f"{name}: {len(grades):,} rows, mean reward {mean:.4g} (standard error {error:.2g}), "
        f"lowest {min(rewards):.4g}, highest {max(rewards):.4g}"
    )
    for part in grades[0].sub_rewards:
        say(f"  {part}: mean {sum(g.sub_rewards.get(part, 0.0) for g in grades) / len(grades):.4g}")
    for text in histogram(rewards):
        say(text)
    for kind, n in Counter(k for g in grades for k, v in g.errors.items() if v is True).items():
        line, first = next((line, g) for line, g in zip(lines, grades, strict=True) if kind in g.errors)
        say(f"{kind}: {n:,} rows, the first in line {line}: {' '.join(first.why.split())[-300:]}")


def histogram(rewards: list[float]) -> list[str]:
    """A bar for each tenth of the range, or for each value where there are at most that many."""
    values = Counter(rewards)
    if len(values) <= BINS:
        counts = [(f"{value:.4g}", values[value]) for value in sorted(values)]
    else:
        low, high = min(rewards), max(rewards)
        width = (high - low) / BINS
        bins = Counter(min(int((r - low) / width), BINS - 1) for r in rewards)
        counts = [(f"{low + i * width:.4g} to {low + (i + 1) * width:.4g}", bins[i]) for i in range(BINS)]
    most, wide = max(n for _, n in counts), max(len(label) for label, _ in counts)
    return [f"  {label:>{wide}}  {'#' * math.ceil(WIDTH * n / most):<{WIDTH}}  {n:,}" for label, n in counts]

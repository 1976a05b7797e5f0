"""What `tunewright demo` prints: the plan in words, progress, scores, rows side by side, what to do next."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tunewright.core.home import Home, find_home
from tunewright.core.run import Run
from tunewright.data.demo import DEPARTMENTS, URGENCIES, ClinicRow
from tunewright.evals.clinic import BASE, TUNED
from tunewright.evals.task import VALID, Scorecard
from tunewright.evals.verdict import judge
from tunewright.metrics.intervals import Interval

PLAIN_EVERY_S = 10.0
SHOWN_ROWS = 4
SHORT = 160
TITLES = {VALID: "valid JSON", "department": "department", "urgency": "urgency"}
Tick = Callable[[str, str], str]


def say(console: Console, text: str = "") -> None:
    """One line (or several), never wrapped, so that commands and paths can be copied."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def introduce(console: Console, n_train: int, n_heldout: int, model: str) -> None:
    say(console, f"The demo teaches {model} to sort the messages of a clinic's patients.")
    say(console, f"A patient's message in; out a JSON object: one of {len(DEPARTMENTS)} departments,")
    say(console, f"one of {len(URGENCIES)} urgencies, and a short reason.")
    say(console, f"1. train a LoRA adapter on {n_train} written examples (time and memory follow below)")
    say(console, f"2. let the model before and after training answer {n_heldout} messages it has never seen")
    say(console, "3. compare the scores, also with simpler methods\n")


@contextmanager
def counter(console: Console, what: str, total: int) -> Iterator[Tick]:
    """tick(answer, system) counts one and returns the answer. A bar on a terminal, else a line now and then."""
    if not console.is_terminal:
        yield _plain_counter(console, what, total)
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total)

        def tick(answer: str, system: str) -> str:
            progress.update(task, advance=1, description=f"{what}: {system}")
            return answer

        yield tick


def _plain_counter(console: Console, what: str, total: int) -> Tick:
    done, last = 0, 0.0

    def tick(answer: str, system: str) -> str:
        nonlocal done, last
        done += 1
        if time.monotonic() - last >= PLAIN_EVERY_S or done == total:
            last = time.monotonic()
            say(console, f"{what}: {done}/{total} ({system})")
        return answer

    return tick


def show_results(
    console: Console, heldout: Sequence[ClinicRow], answers: Mapping[str, Sequence[str]], cards: Sequence[Scorecard]
) -> None:
    """Some rows side by side, the table of scores, the verdict."""
    say(console, "\nBefore and after, on messages that were not in the training data:")
    for i in range(0, len(heldout), max(1, len(heldout) // SHOWN_ROWS))[:SHOWN_ROWS]:
        show_row(console, heldout[i], answers[BASE][i], answers[TUNED][i])
    say(console, f"\nScores on {len(heldout)} held-out messages, with 95 % intervals:")
    console.print(score_table(cards))
    system = next(c for c in cards if c.name == TUNED)
    for measure in (m for m in system.outcomes if m != VALID):
        say(console, str(judge(system, [c for c in cards if c is not system], measure)))


def show_row(console: Console, row: ClinicRow, base: str, tuned: str) -> None:
    """One message with both answers and the right one."""
    lines = {"patient": row.message, BASE: base, TUNED: tuned, "right": row.answer}
    table = Table.grid(padding=(0, 1))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in lines.items():
        table.add_row(name, escape(shorten(text)))
    say(console)
    console.print(table, highlight=False)


def shorten(text: str, length: int = SHORT) -> str:
    """One line of at most `length` characters."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 2].rstrip() + " …"


def score_table(cards: Sequence[Scorecard]) -> Table:
    table = Table("", *TITLES.values(), box=SIMPLE)
    for card in sorted(cards, key=lambda c: c.name != TUNED):
        style = "bold" if card.name == TUNED else None
        table.add_row(card.name, *(percent(card, measure) for measure in TITLES), style=style)
    return table


def percent(card: Scorecard, measure: str) -> str:
    """`87 % (79-92)`, or a dash where the system has no such measure."""
    got = card.share(measure)
    return "-" if got is None else percent_of(got)


def percent_of(share: Interval) -> str:
    return f"{100 * share.value:.0f} % ({100 * share.low:.0f}-{100 * share.high:.0f})"


def next_steps(console: Console, home: Home, run: Run) -> None:
    """Where the result is, and how to use it."""
    place = "" if home.root == find_home().root else f" --home {shlex.quote(str(home.root))}"
    name = run.job().name
    say(console, f"\nThe model: {name}")
    say(console, f"Its files (open in peft, too): {run.result}")
    say(console, "\nNext: the dashboard, the playground and OpenAI's API on this machine:\n")
    say(console, f"    tunewright up --open{place}\n")
    say(console, "and from any program that speaks to OpenAI:\n")
    say(console, "    from openai import OpenAI")
    say(console, '    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")')
    ask = '[{"role": "user", "content": "My ankle is swollen since the match last night."}]'
    call = f'client.chat.completions.create(model="{name}", messages={ask})'
    say(console, f"    print({call}.choices[0].message.content)")

"""Check a data file in one pass and constant memory, and read it as conversations."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from tunewright.core.conversation import Conversation
from tunewright.core.errors import DataError, DataReport, Problem
from tunewright.data.answers import unusable_answers
from tunewright.data.formats import FORMATS
from tunewright.data.formats.base import Format
from tunewright.data.formats.detect import Decision, decide
from tunewright.data.lines import BAD_FORMAT
from tunewright.data.sources import KINDS, read_rows, sniff

SAMPLE = 100
SHOWN = 5
MAX_NOTES = 20
TOO_FEW = "invalid_n_examples"
# OpenAI's words for a file's shape and for the method that uses it.
SHAPES = {
    "chat": ("fine-tune-chat", "supervised"),
    "preference": ("fine-tune-preference", "dpo"),
    "unpaired": ("answers marked good or bad", "kto"),
    "prompt": ("prompts without answers", "answers"),
    "text": ("text", "pretraining"),
    "labelled": ("text with labels", "classification"),
}


def check_file(
    path: Path,
    *,
    format: str = "auto",
    purpose_shapes: Collection[str] | None = None,
    method: str = "",
    objectives: Mapping[str, Sequence[str]] | None = None,
    min_examples: int = 10,
    limit: int = 100,
    name: str = "",
) -> DataReport:
    """Read the whole file and report what is wrong with it.

    format: a name of FORMATS, or `auto` to decide from the first 100 rows.
    purpose_shapes: the row shapes (`chat`, `preference`, `unpaired`, `text`, `labelled`) that the job's objective can
        use; None allows any.
    method, objectives: for the message about another shape: what the job's objective is called, and which objectives
        use the rows of a shape.
    min_examples: fewer rows than this are a problem.
    limit: how many problems are kept (all are counted).
    name: the file's name as the user knows it.
    Raises DataError only if the file cannot be opened, SpecError for an unknown format name.
    """
    path = Path(path)
    report = DataReport(name=name or path.name)
    chosen = choose_format(path, format, name)
    notes: Counter[str] = Counter()
    if chosen.format is not None:
        report.format, report.reason = chosen.format.name, chosen.reason
    elif chosen.reason:
        _add(report, Problem(1, chosen.reason), limit)
    for line, row in read_rows(path, name):
        report.n_rows += 1
        if isinstance(row, Problem):
            _add(report, row, limit)
        elif chosen.format is not None:
            conversation = _check_row(chosen.format, row, line, report, limit, notes)
            if conversation is not None and purpose_shapes is not None and report.shape not in purpose_shapes:
                text = _wrong_shape(report.name, report.shape, purpose_shapes, method, objectives or {})
                _add(report, Problem(line, text), limit)
                purpose_shapes = None  # said once
    if not report.shape and format != "auto" and purpose_shapes is not None:
        shape = _shape_of(path, name)
        if shape and shape not in purpose_shapes:  # no row is of the wanted format because all are of another one
            text = _wrong_shape(report.name, shape, purpose_shapes, method, objectives or {})
            report.problems, report.n_problems = [Problem(1, text)], 1
    if report.n_rows < min_examples:
        empty = " (the file is empty)" if path.stat().st_size == 0 else ""
        text = f"file has {report.n_rows} example(s), but must have at least {min_examples} examples{empty}"
        _add(report, Problem(max(report.n_rows, 1), text, code=TOO_FEW), limit)
    report.notes += [f"{text} ({n} row{'s' if n > 1 else ''})" for text, n in notes.items()]
    return report


def choose_format(path: Path, format: str = "auto", name: str = "") -> Decision:
    """The format by name, or by the fields of the first rows. An empty reason means: no row could be read."""
    if format != "auto":
        return Decision(FORMATS.load(format), f"{FORMATS.load(format).title}: as the job says.")
    first = itertools.islice(read_rows(path, name), SAMPLE)
    fields = [list(row) for _, row in first if isinstance(row, dict)]
    if not fields:
        return Decision(None, "")
    found, kind = decide(fields), sniff(path, name)
    return replace(found, reason=f"{KINDS[kind]}; {found.reason}") if found.format and isinstance(kind, str) else found


def read_conversations(path: Path, format: str = "auto", name: str = "") -> Iterator[Conversation]:
    """Every row as a Conversation, in file order. Raises DataError at the first row that is not valid."""
    path = Path(path)
    chosen = choose_format(path, format, name)
    label = name or path.name
    if chosen.format is None and chosen.reason:
        raise DataError(f"{label}: {chosen.reason}")
    for line, row in read_rows(path, name):
        if isinstance(row, Problem) or chosen.format is None:
            problem = row if isinstance(row, Problem) else Problem(line, "has no known format.")
            raise DataError(f"{label} {problem}", problems=[problem], code=problem.code)
        try:
            yield chosen.format.convert(row, line)
        except DataError as e:
            raise DataError(f"{label} {e.message}", problems=e.problems, code=e.code) from e


def raise_for(report: DataReport, what: str = "training") -> None:
    """Raise one DataError with OpenAI's code and text if the report has problems.

    what: `training` or `validation`; it gives the param (`training_file`) and the words.
    """
    if not report.n_problems:
        return
    rows = [p for p in report.problems if p.code != TOO_FEW]
    if not rows:
        _raise_first(report, what, f"{what.capitalize()} {report.problems[0].message}", TOO_FEW)
    first = rows[0]
    code = first.code if first.code != "invalid_training_file" else f"invalid_{what}_file"
    cause = f"a file format error in the {what} file" if first.code == BAD_FORMAT else f"an invalid {what} file"
    text = f"The job failed due to {cause}. {_sentence(first)} {_where(report, first)}{_others(report)}"
    _raise_first(report, what, text, code)


def _raise_first(report: DataReport, what: str, text: str, code: str) -> NoReturn:
    raise DataError(text, problems=report.problems, code=code, param=f"{what}_file")


def _sentence(p: Problem) -> str:
    if p.message.startswith(("Unexpected", "Input file", "Expected", "The ")):
        return p.message
    joint = ", " if p.message.startswith("message ") else " "
    return f"Invalid file format. Example {p.line}{joint}{p.message}"


def _where(report: DataReport, p: Problem) -> str:
    return f"({report.name} line {p.line}{f', field {p.field}' if p.field else ''})"


def _others(report: DataReport) -> str:
    """The next problems in short; the error's `problems` has up to 100."""
    if report.n_problems == 1:
        return ""
    rest = "; ".join(str(p) for p in report.problems[1:SHOWN])
    return f" {report.n_problems} problems in all; next: {rest}"


def _check_row(
    format: Format,
    row: dict,
    line: int,
    report: DataReport,
    limit: int,
    notes: Counter[str],
) -> Conversation | None:
    """The row, or None for one that its format refuses."""
    try:
        conversation = format.convert(row, line)
    except DataError as e:
        for problem in e.problems:
            _add(report, problem, limit)
        return None
    for problem in unusable_answers(conversation):
        _add(report, problem, limit)
    shape = conversation.shape
    report.shape = report.shape or shape
    if shape != report.shape:
        text = f"is a {shape} row, but the rows before it are {report.shape} rows. Use one kind in one file."
        _add(report, Problem(line, text), limit)
    for note in _notes(format, row, conversation):
        if note in notes or len(notes) < MAX_NOTES:
            notes[note] += 1
    return conversation


def _shape_of(path: Path, name: str) -> str:
    """The shape of the file's first row in the format that its fields say; '' if there is none."""
    try:
        return next((row.shape for row in read_conversations(path, "auto", name)), "")
    except DataError:
        return ""


def _wrong_shape(
    name: str, shape: str, wanted: Collection[str], method: str, objectives: Mapping[str, Sequence[str]]
) -> str:
    kind, usual = SHAPES[shape]
    given = method or ", ".join(SHAPES[s][1] for s in wanted)
    fits = f" Objectives for such rows: {', '.join(objectives[shape])}." if objectives.get(shape) else ""
    needs = " or ".join(SHAPES[s][0] for s in wanted)
    return (
        f"Input file {name} is in the {kind} format, but the specified fine-tuning job is not using '{usual}' "
        f"as the training method (provided method={given}).{fits} '{given}' needs the format {needs}."
    )


def _notes(format: Format, row: dict, conversation: Conversation) -> Iterator[str]:
    """What is allowed but probably not meant."""
    if format.knows and not row.keys() <= format.knows:
        unused = ", ".join(f"'{k}'" for k in row if k not in format.knows)
        yield f"the fields {unused[:200]} are not used"
    if conversation.shape == "chat" and conversation.messages[-1].role != "assistant":
        yield "the row does not end with an assistant message; what follows the last one is not trained"
    if conversation.tools:
        offered = {t["function"]["name"] for t in conversation.tools}
        called = {c.function.name for m in conversation.messages for c in m.tool_calls or ()}
        for name in sorted(called - offered):
            yield f"the function '{name[:80]}' is called but is not among the row's tools"


def _add(report: DataReport, problem: Problem, limit: int) -> None:
    report.n_problems += 1
    if len(report.problems) < limit:
        report.problems.append(problem)

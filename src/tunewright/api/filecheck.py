"""Looking at uploaded data: superficially at upload, as OpenAI does, and line by line when asked."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from tunewright.api.requests import CheckFile
from tunewright.api.schemas import FileReport, ProblemRow
from tunewright.core.errors import DataError, Problem
from tunewright.data.sources import read_rows
from tunewright.data.validate import check_file, raise_for
from tunewright.jobs.rows import FileRow

INVALID = "Invalid file format."
# purposes whose files are rows of JSON
ROW_PURPOSES = ("fine-tune", "batch", "evals")


def check_upload(path: Path, filename: str, purpose: str) -> None:
    """Raise DataError at the first line that is not a JSON object. Deeper checks are the job's."""
    if purpose not in ROW_PURPOSES:
        return
    n_rows = 0
    for _, row in read_rows(path, filename):
        n_rows += 1
        if isinstance(row, Problem):
            text = row.message if row.message.startswith("Expected") else f"{INVALID} Example {row.line} {row.message}"
            raise DataError(text, problems=[row], code=row.code, param="file")
    if n_rows == 0:
        raise DataError("The file is empty. Expected JSONL: one JSON object a line.", param="file")


def check_training_file(path: Path, row: FileRow, wanted: CheckFile) -> FileReport:
    """What a job would say of the file, with up to 100 problems."""
    report = check_file(path, format=wanted.format, min_examples=wanted.min_examples, name=row.filename)
    message = ""
    try:
        raise_for(report)
    except DataError as e:
        message = e.message
    return FileReport(
        file_id=row.id,
        format=report.format,
        shape=report.shape,
        reason=report.reason,
        n_rows=report.n_rows,
        n_problems=report.n_problems,
        problems=[ProblemRow(**asdict(p)) for p in report.problems],
        notes=report.notes,
        usable=not message,
        message=message,
    )

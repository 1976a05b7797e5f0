"""Choosing a data file on a create page: dropped or taken from earlier ones, and checked line by line at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nicegui import events, ui
from nicegui.element import Element

from tunewright.web import kit
from tunewright.web.client import ApiError
from tunewright.web.forms import AUTO, row_format
from tunewright.web.pages.form import Form
from tunewright.web.series import count, size


@dataclass(frozen=True)
class Role:
    """What a file is for. words: of the place to drop it. least: rows that it needs; None is not looked at as rows."""

    title: str
    words: str
    least: int | None = 1
    purpose: str = "fine-tune"
    accept: str = ".jsonl,.json,.csv,.parquet,.txt"


TRAINING = Role("Training data", "Drop a file here, or choose one", 10)
VALIDATION = Role("Validation data (optional)", "Rows kept apart, to see when the model begins to memorise")
DOCUMENT = Role("Document", "Drop a text or Markdown file here, or choose one", None, "user_data", ".txt,.md,.markdown")


def build_data(form: Form, key: str, role: Role) -> Callable[[], None]:
    """The place of a file; returns what is to be called when the objective has changed. key: of the draft."""
    with kit.field(role.title):
        place = kit.tag(kit.box("tw-data"), key)

    def draw() -> None:
        place.clear()
        with place:
            chosen = form.draft.get(key)
            build_chosen(form, key, chosen, draw) if chosen else build_choice(form, key, role, place, draw)

    draw()
    check_again(form, key, role, place, draw)
    return lambda: check_again(form, key, role, place, draw)


def check_again(form: Form, key: str, role: Role, place: Element, draw: Callable[[], None]) -> None:
    """Check the file anew if the objective that was chosen since would read its rows in another format."""
    file, format = form.draft.get(key), row_format(key, form.draft, form.describe)
    if file and role.least is not None and file.get("read_as", AUTO) != format:
        file["read_as"] = format
        kit.spawn(take(form, key, role, file, place, draw), place)


def build_choice(form: Form, key: str, role: Role, place: Element, draw: Callable[[], None]) -> None:
    """No file yet: drop one, or take one that was uploaded before."""

    async def uploaded(event: events.UploadEventArguments) -> None:
        place.clear()
        with place:
            kit.spinner(f"Sending {event.file.name} ({size(event.file.size())})…")
        try:
            sent = await form.session.api.upload(
                event.file.name, event.file.size(), event.file.iterate(), purpose=role.purpose
            )
        except ApiError as e:
            draw()
            with place:
                kit.error_box(e.message, f"{event.file.name} was not accepted.", name="upload-error")
                if e.problems:
                    problem_table(e.problems, key)
            return
        form.files.insert(0, sent)
        await take(form, key, role, sent, place, draw)

    kit.drop_zone(role.words, uploaded, accept=role.accept, name=f"upload-{key}")
    earlier = [f for f in form.files if f["purpose"] == role.purpose]
    if earlier:
        options = {f["id"]: f"{f['filename']} · {size(f['bytes'])} · {f['id']}" for f in earlier}

        async def pick(file_id: str) -> None:
            await take(form, key, role, next(f for f in form.files if f["id"] == file_id), place, draw)

        kit.select("Or an earlier file", options, None, pick, name=f"earlier-{key}", search=True).props(
            'label="Or an earlier file"'
        )


async def take(
    form: Form, key: str, role: Role, file: dict[str, Any], place: Element, draw: Callable[[], None]
) -> None:
    """Use this file, and check it line by line right away."""
    format = row_format(key, form.draft, form.describe)
    kept = {"id": file["id"], "filename": file["filename"], "bytes": file["bytes"], "read_as": format}
    if role.least is not None:
        place.clear()
        with place:
            kit.spinner(f"Checking every line of {file['filename']}…")
        try:
            kept["check"] = await form.session.api.check_file(file["id"], role.least, format)
        except ApiError as e:
            kept["check_error"] = e.message
    form.set(key, kept)
    draw()


def build_chosen(form: Form, key: str, file: dict[str, Any], draw: Callable[[], None]) -> None:
    def remove() -> None:
        form.set(key, None)
        draw()

    with kit.box("tw-file"):
        ui.icon("description").props("aria-hidden=true").classes("tw-file-icon")
        with kit.box("tw-grow"):
            kit.Text(file["filename"], "tw-file-name")
            kit.Text(f"{size(file['bytes'])} · {file['id']}", "tw-muted tw-small")
        kit.icon_button("close", "Choose another file", remove, f"remove-{key}")
    if file.get("check_error"):
        kit.error_box(file["check_error"], "The file could not be checked.")
    elif file.get("check"):
        build_report(file["check"], key)


def build_report(check: dict[str, Any], key: str) -> None:
    """What the line-by-line check found."""
    good = check["usable"]
    with kit.tag(kit.box(f"tw-report tw-report-{'good' if good else 'bad'}"), f"check-{key}"):
        ui.icon("check_circle" if good else "error").props("aria-hidden=true")
        with kit.box():
            for number, line in enumerate(report_lines(check)):
                kit.Text(line, "tw-muted tw-small tw-line" if number else "tw-strong")
    if check["problems"]:
        problem_table(check["problems"], key)
    hidden = check["n_problems"] - len(check["problems"])
    if hidden > 0:
        kit.Text(f"{count(hidden)} more are not shown.", "tw-muted tw-small")


def report_lines(check: dict[str, Any]) -> list[str]:
    """The verdict, then what explains it."""
    found = f"{count(check['n_rows'])} rows" + (f" · {check['format']}" if check["format"] else "")
    if check["usable"]:
        return [f"{found}: every line can be used", check["reason"], *check["notes"]]
    if not check["n_problems"]:
        return [check["message"], found]
    advice = "Correct the file and choose it again; nothing has been started."
    return [f"{count(check['n_problems'])} problems in {found}", advice, *check["notes"]]


def problem_table(problems: list[dict[str, Any]], key: str) -> None:
    rows = [(p["line"], field_cell(p["field"]), problem_text(p), p["allowed"] or "–") for p in problems]
    kit.table(("Line", "Field", "Problem", "Allowed"), rows, "Problems in the file", f"problems-{key}")


def field_cell(path: str) -> Callable[[], Any]:
    return lambda: kit.Text(path or "–", "tw-mono")


def problem_text(problem: dict[str, Any]) -> str:
    """The message, with the value where it does not say it itself."""
    value = str(problem.get("value") or "")
    return problem["message"] if not value or value in problem["message"] else f"{problem['message']} Found: {value}"


def file_words(file: dict[str, Any]) -> str:
    check = file.get("check")
    return f"{file['filename']} ({count(check['n_rows'])} rows)" if check else file["filename"]


def file_problems(draft: dict[str, Any], roles: dict[str, str]) -> list[str]:
    """Files that were checked and found wanting. roles: key of the draft -> what the file is."""
    found = []
    for key, title in roles.items():
        file = draft.get(key) or {}
        check = file.get("check")
        if check and not check["usable"]:
            found.append(f"{title}: {file['filename']} cannot be used as it is. {report_lines(check)[0]}.")
    return found

"""A new job: data checked line by line at once, model and method, hyperparameters. The draft survives a reload."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nicegui import events, ui
from nicegui.element import Element

from tunewright.web import kit
from tunewright.web.client import ApiError
from tunewright.web.desk import Session
from tunewright.web.forms import FormField, default_part, fields, job_request, shown
from tunewright.web.series import count, size

ACCEPTED = ".jsonl,.json,.csv,.parquet,.txt"
ROLES = {
    "training_file": ("Training data", "Drop a file here, or choose one"),
    "validation_file": ("Validation data (optional)", "Rows kept apart, to see when the model begins to memorise"),
}
# rows that a job asks for
MIN_EXAMPLES = {"training_file": 10, "validation_file": 1}
KIND_LABELS = {"objective": "Objective", "tuner": "What is trained", "optimizer": "Optimizer", "schedule": "Schedule"}


@dataclass
class Form:
    """The page's state: the draft (kept in the session), what can be chosen, and the places that depend on it."""

    session: Session
    draft: dict[str, Any]
    describe: dict[str, Any]
    models: list[str]
    files: list[dict[str, Any]]
    refresh: list[Callable[[], None]]

    def set(self, key: str, value: Any) -> None:
        """Change the draft, keep it, and redraw what shows it."""
        self.draft[key] = value
        self.keep()

    def keep(self) -> None:
        self.session.store["draft"] = self.draft
        for step in self.refresh:
            step()

    def part(self, kind: str) -> str:
        return self.draft.get(kind) or default_part(kind, self.describe)


def build(session: Session) -> None:
    with kit.box("tw-page") as place:
        kit.heading("New fine-tuning job", 1)
        body = kit.box()

    async def fetch() -> Form:
        describe, models, files = await session.api.describe(), await session.api.models(), await session.api.files()
        draft = dict(session.store.get("draft") or {})
        return Form(session, draft, describe, [m["id"] for m in models], files, [])

    with place:
        kit.load(body, fetch, build_form)


def build_form(form: Form) -> None:
    with kit.box("tw-create"):
        with kit.box("tw-form"):
            with kit.card("1 · Data"):
                for role in ROLES:
                    build_data(form, role)
            with kit.card("2 · Model and method"):
                build_model(form)
                build_part(form, "objective")
                build_part(form, "tuner")
            with kit.card("3 · Hyperparameters"):
                build_hyperparameters(form)
            with kit.card("4 · Name"):
                build_name(form)
        with kit.card("Summary", "tw-summary"):
            build_summary(form)


# --- data ------------------------------------------------------------------------------------------------------------


def build_data(form: Form, role: str) -> None:
    title, _ = ROLES[role]
    with kit.field(title):
        place = kit.tag(kit.box("tw-data"), role)

    def draw() -> None:
        place.clear()
        with place:
            chosen = form.draft.get(role)
            build_chosen(form, role, chosen, draw) if chosen else build_choice(form, role, place, draw)

    draw()


def build_choice(form: Form, role: str, place: Element, draw: Callable[[], None]) -> None:
    """No file yet: drop one, or take one that was uploaded before."""

    async def uploaded(event: events.UploadEventArguments) -> None:
        place.clear()
        with place:
            kit.spinner(f"Sending {event.file.name} ({size(event.file.size())})…")
        try:
            sent = await form.session.api.upload(event.file.name, event.file.size(), event.file.iterate())
        except ApiError as e:
            draw()
            with place:
                kit.error_box(e.message, f"{event.file.name} was not accepted.", name="upload-error")
                if e.problems:
                    problem_table(e.problems, role)
            return
        form.files.insert(0, sent)
        await take(form, role, sent, place, draw)

    kit.drop_zone(ROLES[role][1], uploaded, accept=ACCEPTED, name=f"upload-{role}")
    if form.files:
        options = {f["id"]: f"{f['filename']} · {size(f['bytes'])} · {f['id']}" for f in form.files}

        async def pick(file_id: str) -> None:
            await take(form, role, next(f for f in form.files if f["id"] == file_id), place, draw)

        kit.select("Or an earlier file", options, None, pick, name=f"earlier-{role}", search=True).props(
            'label="Or an earlier file"'
        )


async def take(form: Form, role: str, file: dict[str, Any], place: Element, draw: Callable[[], None]) -> None:
    """Use this file, and check it line by line right away."""
    kept = {"id": file["id"], "filename": file["filename"], "bytes": file["bytes"]}
    place.clear()
    with place:
        kit.spinner(f"Checking every line of {file['filename']}…")
    try:
        kept["check"] = await form.session.api.check_file(file["id"], MIN_EXAMPLES[role])
    except ApiError as e:
        kept["check_error"] = e.message
    form.set(role, kept)
    draw()


def build_chosen(form: Form, role: str, file: dict[str, Any], draw: Callable[[], None]) -> None:
    def remove() -> None:
        form.set(role, None)
        draw()

    with kit.box("tw-file"):
        ui.icon("description").props("aria-hidden=true").classes("tw-file-icon")
        with kit.box("tw-grow"):
            kit.Text(file["filename"], "tw-file-name")
            kit.Text(f"{size(file['bytes'])} · {file['id']}", "tw-muted tw-small")
        kit.icon_button("close", "Choose another file", remove, f"remove-{role}")
    if file.get("check_error"):
        kit.error_box(file["check_error"], "The file could not be checked.")
    elif file.get("check"):
        build_report(file["check"], role)


def build_report(check: dict[str, Any], role: str) -> None:
    """What the line-by-line check found."""
    good = check["usable"]
    with kit.tag(kit.box(f"tw-report tw-report-{'good' if good else 'bad'}"), f"check-{role}"):
        ui.icon("check_circle" if good else "error").props("aria-hidden=true")
        with kit.box():
            for number, line in enumerate(report_lines(check)):
                kit.Text(line, "tw-muted tw-small tw-line" if number else "tw-strong")
    if check["problems"]:
        problem_table(check["problems"], role)
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


def problem_table(problems: list[dict[str, Any]], role: str) -> None:
    rows = [(p["line"], field_cell(p["field"]), problem_text(p), p["allowed"] or "–") for p in problems]
    kit.table(("Line", "Field", "Problem", "Allowed"), rows, "Problems in the file", f"problems-{role}")


def field_cell(path: str) -> Callable[[], Any]:
    return lambda: kit.Text(path or "–", "tw-mono")


def problem_text(problem: dict[str, Any]) -> str:
    """The message, with the value where it does not say it itself."""
    value = str(problem.get("value") or "")
    return problem["message"] if not value or value in problem["message"] else f"{problem['message']} Found: {value}"


# --- model and method ------------------------------------------------------------------------------------------------


def build_model(form: Form) -> None:
    tuned = [m for m in form.models if m.startswith("ft:")]
    ordered = [m for m in form.models if m not in tuned] + tuned
    if form.draft.get("model") not in form.models:
        form.draft["model"] = ordered[0] if ordered else None
    with kit.field("Base model", "A fine-tuned model can be trained further."):
        kit.select(
            "Base model",
            {m: m for m in ordered},
            form.draft["model"],
            lambda v: form.set("model", v),
            name="model",
            search=True,
        )


def build_part(form: Form, kind: str) -> None:
    """One table of the describe file: which row, what it is, and its options folded away."""
    rows = form.describe[kind]
    if form.draft.get(kind) not in rows:
        form.draft[kind] = default_part(kind, form.describe)
    label = KIND_LABELS[kind]
    with kit.field(label):
        options = {name: row_title(name, row) for name, row in sorted(rows.items())}
        kit.select(label, options, form.draft[kind], lambda v: chosen(v), name=kind)
        words = kit.Text("", "tw-muted tw-small")
        place = kit.box()

    def chosen(name: str) -> None:
        form.set(kind, name)
        draw()

    def draw() -> None:
        row = rows[form.part(kind)]
        words.set_text(row.get("doc") or row.get("card", {}).get("summary") or "")
        place.clear()
        with place:
            build_options(form, kind, form.part(kind), row)

    draw()


def row_title(name: str, row: dict[str, Any]) -> str:
    title = row.get("card", {}).get("title")
    return f"{title} ({name})" if title and title.lower() != name else title or name


def build_options(form: Form, kind: str, name: str, row: dict[str, Any]) -> None:
    known = fields(row["schema"], row["defaults"])
    if not known:
        return
    texts = form.draft.setdefault("options", {}).setdefault(f"{kind}.{name}", {})
    with ui.expansion(f"Options of {name}").classes("tw-options").props("dense") as folded:
        kit.tag(folded, f"options-{kind}")
        with kit.box("tw-grid"):
            for one in known:
                with kit.field(one.label, one.help):
                    build_option(form, kind, one, texts)


def build_option(form: Form, kind: str, one: FormField, texts: dict[str, Any]) -> None:
    name = f"{kind}-{one.name}"
    value = texts.get(one.name, one.default)

    def keep(new: Any) -> None:
        texts[one.name] = new
        form.keep()

    if one.kind == "bool":
        made = ui.switch(value=bool(value), on_change=lambda e: keep(e.value))
        made.props["aria-label"] = one.label
        kit.tag(made, name)
    elif one.kind == "choice":
        kit.select(one.label, {c: str(c) for c in one.choices}, value, keep, name=name)
    else:
        text = value if one.name in texts else shown(one, value)
        kit.text_input(one.label, text, keep, name=name, placeholder="none" if one.optional else "").props(
            "debounce=200"
        )


# --- hyperparameters and name ----------------------------------------------------------------------------------------

HYPER_HELP = {
    "n_epochs": ("Epochs", "Passes over the data, 1 to 50"),
    "batch_size": ("Batch size", "Rows in one step, 1 to 256"),
    "learning_rate": ("Learning rate", "auto is the usual one of what is trained"),
    "learning_rate_multiplier": ("Learning-rate multiplier", "Times the automatic learning rate"),
}


def build_hyperparameters(form: Form) -> None:
    with kit.box("tw-grid"):
        for key, (label, help) in HYPER_HELP.items():
            with kit.field(label, help):
                value = form.draft.get(key) or ""
                made = kit.text_input(label, value, lambda v, k=key: form.set(k, v), name=key, placeholder="auto")
                made.props("debounce=200")
    with kit.box("tw-grid"):
        build_part(form, "optimizer")
        build_part(form, "schedule")


def build_name(form: Form) -> None:
    rows = (
        ("suffix", "Suffix", "Part of the new model's name, up to 64 letters, digits and . _ -", "clinic-triage"),
        ("seed", "Seed", "The same seed and data give the same model", "random"),
    )
    with kit.box("tw-grid"):
        for key, label, help, hint in rows:
            with kit.field(label, help):
                value = form.draft.get(key) or ""
                made = kit.text_input(label, value, lambda v, k=key: form.set(k, v), name=key, placeholder=hint)
                made.props("debounce=200")


# --- summary ---------------------------------------------------------------------------------------------------------


def build_summary(form: Form) -> None:
    words = kit.box()
    problems = kit.box()

    async def start() -> None:
        body, wrong = job_request(form.draft, form.describe)
        wrong += data_problems(form.draft)
        problems.clear()
        if not wrong:
            try:
                job = await form.session.api.create_job(body)
            except ApiError as e:
                wrong = [e.message]
            else:
                form.session.store["draft"] = {
                    k: v for k, v in form.draft.items() if k in ("model", "tuner", "objective")
                }
                form.session.jobs().hurry()
                kit.go(f"/jobs/{job['id']}")
                return
        with problems:
            kit.error_box("\n".join(wrong), "The job was not started.", name="create-error")

    def clear() -> None:
        form.session.store.pop("draft", None)
        kit.reopen("/jobs/new")

    def draw() -> None:
        words.clear()
        with words:
            kit.facts(summary_rows(form), "summary")

    form.refresh.append(draw)
    draw()
    kit.button("Create job", start, icon="play_arrow", kind="primary", name="create-job").classes("tw-wide")
    kit.button("Start over", clear, kind="quiet", name="clear-draft").classes("tw-wide")


def summary_rows(form: Form) -> list[tuple[str, str]]:
    draft = form.draft
    training, validation = draft.get("training_file"), draft.get("validation_file")
    hyper = f"{draft.get('n_epochs') or 'auto'} epochs, {draft.get('batch_size') or 'auto'} rows a step"
    return [
        ("Data", file_words(training) if training else "choose a file"),
        ("Validation", file_words(validation) if validation else "none"),
        ("Base model", draft.get("model") or "choose a model"),
        ("Method", f"{form.part('objective')} · {form.part('tuner')}"),
        ("Steps", hyper),
        ("Suffix", draft.get("suffix") or "none"),
    ]


def file_words(file: dict[str, Any]) -> str:
    check = file.get("check")
    return f"{file['filename']} ({count(check['n_rows'])} rows)" if check else file["filename"]


def data_problems(draft: dict[str, Any]) -> list[str]:
    """Files that were checked and found wanting."""
    found = []
    for role, (title, _) in ROLES.items():
        file = draft.get(role) or {}
        check = file.get("check")
        if check and not check["usable"]:
            what = title.removesuffix(" (optional)")
            found.append(f"{what}: {file['filename']} cannot be used as it is. {report_lines(check)[0]}.")
    return found

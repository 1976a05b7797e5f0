"""A new job: data checked line by line at once, model and method, hyperparameters. The draft survives a reload."""

from __future__ import annotations

import json
from typing import Any

import yaml
from nicegui import ui
from nicegui.element import Element

from tunewright.web import kit
from tunewright.web.client import ApiDown, ApiError
from tunewright.web.desk import Session
from tunewright.web.forms import clashes, job_file, job_request, stage_names
from tunewright.web.pages import beside, chain
from tunewright.web.pages.beside import build_mix, build_retain
from tunewright.web.pages.chain import build_stages
from tunewright.web.pages.data import TRAINING, VALIDATION, build_data, file_problems, file_words
from tunewright.web.pages.form import Form, build_lines, build_part, open_form

KEPT = ("model", "tuner", "objective", "quantization")  # of a draft whose job was created
ROLES = {"training_file": TRAINING, "validation_file": VALIDATION}
HYPER = {
    "n_epochs": ("Epochs", "Passes over the data, 1 to 50", "auto"),
    "batch_size": ("Batch size", "Rows in one step, 1 to 256", "auto"),
    "learning_rate": ("Learning rate", "auto is the usual one of what is trained", "auto"),
    "learning_rate_multiplier": ("Learning-rate multiplier", "Times the automatic learning rate", "auto"),
}
NAME = {
    "suffix": ("Suffix", "Part of the new model's name, up to 64 letters, digits and . _ -", "clinic-triage"),
    "seed": ("Seed", "The same seed and data give the same model", "random"),
}


def build(session: Session) -> None:
    with kit.box("tw-page") as place:
        kit.heading("New fine-tuning job", 1)
        body = kit.box()

    with place:
        kit.load(body, lambda: open_form(session, "draft"), build_form)


def build_form(form: Form) -> None:
    with kit.box("tw-create"):
        with kit.box("tw-form"):
            with kit.card("1 · Data"):
                for key, role in ROLES.items():
                    form.refresh.append(build_data(form, key, role))
                build_mix(form)
            with kit.card("2 · Model and method"):
                build_model(form)
                for kind in ("objective", "tuner", "quantization"):
                    build_part(form, kind)
                build_retain(form)
            with kit.card("3 · Hyperparameters"):
                build_lines(form, HYPER)
                with kit.box("tw-grid"):
                    build_part(form, "optimizer")
                    build_part(form, "schedule")
            with kit.card("4 · Stages"):
                build_stages(form)
            with kit.card("5 · Name"):
                build_lines(form, NAME)
        with kit.card("Summary", "tw-summary"):
            build_summary(form)


def build_model(form: Form) -> None:
    with kit.field("Base model", "A fine-tuned model can be trained further."):
        kit.select(
            "Base model",
            {m: m for m in form.models},
            form.draft["model"],
            lambda v: form.set("model", v),
            name="model",
            search=True,
        )


# --- summary ---------------------------------------------------------------------------------------------------------


def build_summary(form: Form) -> None:
    words = kit.box()
    buttons = kit.box("tw-stack")
    problems = kit.box()

    async def start() -> None:
        body, wrong = job_request(form.draft, form.describe)
        wrong += file_problems(form.draft, all_roles(form.draft))
        problems.clear()
        if not wrong:
            try:
                job = await form.session.api.create_job(body)
            except ApiError as e:
                wrong = [e.message]
            else:
                form.session.store["draft"] = {k: v for k, v in form.draft.items() if k in KEPT}
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
    with buttons:
        kit.button("Create job", start, icon="play_arrow", kind="primary", name="create-job").classes("tw-wide")
        kit.button("Start over", clear, kind="quiet", name="clear-draft").classes("tw-wide")
    build_verdict(form)


def build_verdict(form: Form) -> None:
    """What the server would say to the draft as it is; asked again whenever the draft rests changed."""
    place = kit.tag(kit.box(), "verdict")
    with ui.expansion("As a job file").classes("tw-options").props("dense") as folded:
        kit.tag(folded, "job-file")
        kit.Text("For `tunewright train`; the data files beside it.", "tw-muted tw-small")
        lines = kit.box()
    asked: list[str] = []

    async def look() -> None:
        body, wrong = job_request(form.draft, form.describe)
        found, key = clashes(form.draft, form.describe), json.dumps([body, wrong])
        if asked == [key]:
            return
        asked[:] = [key]
        show_file(lines, None if wrong else job_file(body, form.draft))
        if not wrong:
            try:
                found = [(await form.session.api.check_job(body))["message"]]
            except ApiDown:
                asked.clear()
                return
            except ApiError as e:
                found = [e.message]
        show(place, [text for text in found if text], ready=not wrong)

    kit.every(0.5, look)


def show_file(place: Element, spec: dict[str, Any] | None) -> None:
    place.clear()
    with place:
        if spec is None:
            kit.Text("Here once what is above is complete.", "tw-muted tw-small")
        else:
            kit.code(yaml.safe_dump(spec, sort_keys=False, allow_unicode=True, width=80))


def show(place: Element, problems: list[str], ready: bool) -> None:
    place.clear()
    with place:
        if problems:
            kit.error_box("\n".join(problems), "This cannot be started.", name="verdict-error")
        elif ready:
            kit.Text("The server would take this job.", "tw-muted tw-small")


def all_roles(draft: dict[str, Any]) -> dict[str, str]:
    return {
        **{k: r.title.removesuffix(" (optional)") for k, r in ROLES.items()},
        **beside.roles(draft),
        **chain.roles(draft),
    }


def summary_rows(form: Form) -> list[tuple[str, str]]:
    draft = form.draft
    training, validation = draft.get("training_file"), draft.get("validation_file")
    hyper = f"{draft.get('n_epochs') or 'auto'} epochs, {draft.get('batch_size') or 'auto'} rows a step"
    more = len((draft.get("mix") or {}).get("ids") or [])
    kept = ", ".join(e["name"] for e in draft.get("retain") or [])
    held = form.part("quantization")
    return [
        ("Data", file_words(training) if training else "choose a file"),
        *([("Mixed with", f"{more} further file{'s' if more > 1 else ''}")] if more else []),
        ("Validation", file_words(validation) if validation else "none"),
        ("Base model", draft.get("model") or "choose a model"),
        ("Method", f"{form.part('objective')} · {form.part('tuner')}"),
        *([("Stages", ", then ".join(stage_names(draft).values()))] if draft.get("stages") else []),
        *([("Base held", held)] if held != "auto" else []),
        *([("Kept by", kept)] if kept else []),
        ("Steps", hyper),
        ("Suffix", draft.get("suffix") or "none"),
    ]

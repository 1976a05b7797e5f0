"""Fine-tuning jobs: the list on the left, the chosen job on the right."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from nicegui import ui

from tunewright.web import kit
from tunewright.web.desk import Session
from tunewright.web.feeds import ACTIVE
from tunewright.web.pages import job as job_page
from tunewright.web.pages.job import title_of
from tunewright.web.pages.stages import chain_of
from tunewright.web.series import ago

# filter -> the statuses it shows
FILTERS: dict[str, tuple[str, ...] | None] = {
    "All": None,
    "Active": (*ACTIVE, "paused"),
    "Succeeded": ("succeeded",),
    "Failed": ("failed", "cancelled"),
}
SHOWN = 100
FOLLOWED = 4


def matching(jobs: list[dict[str, Any]], words: str, group: str) -> list[dict[str, Any]]:
    """The jobs whose title, id or model has all the words, and whose status is in the group."""
    statuses = FILTERS[group]
    wanted = words.lower().split()
    return [
        j
        for j in jobs
        if (statuses is None or j["status"] in statuses)
        and all(w in f"{title_of(j)} {j['id']} {j['model']} {j.get('fine_tuned_model')}".lower() for w in wanted)
    ]


@dataclass
class ListState:
    """What decides how the list looks; a difference from the last drawing means drawing it anew."""

    words: str = ""
    group: str = "All"
    path: str = ""
    drawn: Any = None
    bars: dict[str, tuple[ui.linear_progress, kit.Text]] = field(default_factory=dict)


def build(session: Session) -> None:
    state = ListState(path=kit.current_path())
    feed = session.jobs()
    with kit.box("tw-split"):
        with kit.box("tw-list", "aside") as pane:
            pane.props["aria-label"] = "Fine-tuning jobs"
            build_filters(state)
            items = kit.tag(kit.box("tw-list-items"), "job-list")
        with kit.box("tw-detail"):
            kit.Pages(
                {"/": lambda: nothing_chosen(session), "/{job_id}": lambda job_id: job_page.build(session, job_id)}
            )

    def draw() -> None:
        jobs = feed.look()
        wanted = (feed.version, state.words, state.group, state.path, int(time.time() // 60))
        if state.drawn != wanted:
            state.drawn = wanted
            items.clear()
            state.bars.clear()
            with items:
                build_items(state, jobs, feed.error)
        follow_active(session, state)

    def moved(path: str) -> None:
        state.path = path

    kit.on_path(moved)
    kit.every(0.5, draw)


def build_filters(state: ListState) -> None:
    def set_words(value: str | None) -> None:
        state.words = value or ""

    def set_group(value: str) -> None:
        state.group = value

    with kit.box("tw-list-head"):
        kit.heading("Fine-tuning jobs", 1)
        search = kit.text_input("Search jobs", "", set_words, name="job-search", placeholder="Search name, model or id")
        search.props("clearable debounce=200")
        kit.choice(list(FILTERS), "All", set_group, name="job-filter")


def build_items(state: ListState, jobs: list[dict[str, Any]] | None, error: Any) -> None:
    if jobs is None:
        kit.spinner("Loading jobs…") if error is None else kit.error_box(error.message)
        return
    found = matching(jobs, state.words, state.group)
    if not found:
        kit.Text("No job matches." if jobs else "No jobs yet.", "tw-muted tw-pad")
    for job in found[:SHOWN]:
        build_item(state, job)
    if len(found) > SHOWN:
        kit.Text(f"{len(found) - SHOWN} older jobs are not shown. Search to find them.", "tw-muted tw-pad")


def build_item(state: ListState, job: dict[str, Any]) -> None:
    target = f"/jobs/{job['id']}"
    kind = "tw-item tw-item-stage" if chain_of(job) else "tw-item"
    with kit.tag(kit.link("", target, kind), "job-row") as row:
        row.props["data-job"] = job["id"]
        if state.path == target:
            row.props["aria-current"] = "true"
        with kit.box("tw-item-top"):
            kit.Text(title_of(job), "tw-item-title")
            kit.chip(job["status"])
        with kit.box("tw-item-sub"):
            kit.Text(job["model"], "tw-ellipsis")
            kit.Text(ago(job["created_at"]), "tw-nowrap")
        if job["status"] in ACTIVE and len(state.bars) < FOLLOWED:
            with kit.box("tw-item-progress"):
                state.bars[job["id"]] = (kit.progress("row-progress"), kit.Text("", "tw-nowrap"))


def follow_active(session: Session, state: ListState) -> None:
    """Keep the bars of the first running jobs moving."""
    for job_id, (bar, words) in state.bars.items():
        points = session.job(job_id).look().points
        if points:
            bar.set_value(points[-1]["step"] / points[-1]["total_steps"])
            words.set_text(f"{points[-1]['step']} / {points[-1]['total_steps']}")


def nothing_chosen(session: Session) -> None:
    """The right side before a job is chosen: the newest job's neighbour, or how to begin."""
    feed = session.jobs()
    with kit.box("tw-center") as place:
        kit.spinner("Loading jobs…")

    def fill() -> None:
        jobs = feed.look()
        if jobs is None:
            return
        timer.cancel()
        place.clear()
        with place:
            pick_one() if jobs else first_steps()

    with place.parent_slot.parent:  # pyright: ignore[reportOptionalMemberAccess]
        timer = kit.every(0.3, fill)


def pick_one() -> None:
    kit.empty_state("ads_click", "Choose a job", "Its progress, charts, events and checkpoints appear here.")


def first_steps() -> None:
    with kit.tag(kit.empty_state("tune", "Train your first model", FIRST_STEPS), "no-jobs"):
        kit.button("New job", lambda: kit.go("/jobs/new"), icon="add", kind="primary")


FIRST_STEPS = (
    "Upload a file with one conversation on each line, choose a base model and start. "
    "The finished model answers in the playground and through the API at once."
)

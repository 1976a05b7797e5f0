"""One job: how far it is, its loss while it falls, what happened, its checkpoints, and what can be done with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from nicegui import ui
from nicegui.element import Element

from tunewright.web import kit
from tunewright.web.chart import Line, LineChart
from tunewright.web.desk import Session
from tunewright.web.feeds import ACTIVE, Feed, JobView
from tunewright.web.pages.stages import build_stages, chain_of, chain_words, share_done, stages_of
from tunewright.web.series import clock, count, duration, number, percent, series

TRAIN, VALID, FULL = "#0f8a7e", "#d9822b", "#6d5bd0"


def three(metric: str) -> dict[str, Line]:
    """Lines of a metric in training, validation batches and full validation."""
    return {
        f"train_{metric}": Line("Training", TRAIN),
        f"valid_{metric}": Line("Validation", VALID, dashed=True),
        f"full_valid_{metric}": Line("Full validation", FULL, dots=True),
    }


def two(metric: str) -> dict[str, Line]:
    """Lines of both answers' metric in training."""
    return {
        f"train_chosen_{metric}": Line("Preferred", TRAIN),
        f"train_rejected_{metric}": Line("Rejected", VALID, dashed=True),
    }


LOSS_LINES, ACCURACY_LINES = three("loss"), three("mean_token_accuracy")


@dataclass(frozen=True)
class More:
    """A chart that appears once a job measures one of its lines. scale: 100 shows percent."""

    title: str
    name: str
    lines: dict[str, Line]
    digits: int = 3
    scale: float = 1.0


MORE = (
    More("Reward margin", "margin-chart", three("reward_margin")),
    More("Pairs in the right order (%)", "order-chart", three("reward_accuracy"), digits=1, scale=100.0),
    More("Mean reward", "mean-reward-chart", three("mean_reward")),
    More("Distance from the start (KL, nats)", "kl-chart", {"train_kl": Line("Training", TRAIN)}),
    More("Entropy (nats a token)", "entropy-chart", {"train_entropy": Line("Training", TRAIN)}),
    More("Clipped (%)", "clip-chart", {"train_clip_share": Line("Training", TRAIN)}, digits=1, scale=100.0),
    More("Length of answers (tokens)", "length-chart", three("completion_tokens_mean"), digits=1),
    More("Groups that say nothing (%)", "dead-chart", {"train_dead_share": Line("Training", TRAIN)}, 1, 100.0),
    More("Rewards", "rewards-chart", two("reward")),
    More("Log-probabilities of the answers", "logps-chart", two("logp"), digits=1),
)
ACTIONS = {
    "pause": ("Pause", "pause", "plain", "Pause this job?", "It keeps its progress and goes on when you resume it."),
    "resume": ("Resume", "play_arrow", "primary", "", ""),
    "cancel": ("Cancel job", "block", "danger", "Cancel this job?", "It stops for good. Checkpoints that exist stay."),
}
POSSIBLE = {
    "validating_files": ("cancel",),
    "queued": ("pause", "cancel"),
    "running": ("pause", "cancel"),
    "paused": ("resume", "cancel"),
}
WAITING = {
    "validating_files": "Every line of the files is checked.",
    "running": "Preparing: the data is rendered and the model loaded.",
    "paused": "Paused before the first step.",
}
MAX_EVENTS = 200


@dataclass
class Parts:
    """The places of the page that change, and what each shows now."""

    head: Element
    progress: Element
    bar: ui.linear_progress
    bar_words: kit.Text
    stages: Element
    charts: Element
    loss: LineChart
    accuracy: LineChart
    checkpoints: Element
    facts: Element
    events: Element
    more: dict[str, LineChart] = field(default_factory=dict)
    shown: dict[str, Any] = field(default_factory=dict)
    steps: bool = False

    def changed(self, name: str, value: Any) -> bool:
        """Whether `value` differs from what the place `name` shows; it is taken as shown from now on."""
        if name in self.shown and self.shown[name] == value:
            return False
        self.shown[name] = value
        return True


def title_of(job: dict[str, Any]) -> str:
    """What people call a job: its suffix, else its id."""
    return suffix_of(job) or job["id"]


def suffix_of(job: dict[str, Any]) -> str:
    """The suffix, from wherever the API tells it."""
    own = job.get("user_provided_suffix")
    parts = (job.get("fine_tuned_model") or "").split(":")
    return own or (parts[3] if len(parts) >= 5 else "")


def build(session: Session, job_id: str) -> None:
    feed = session.job(job_id)
    with kit.tag(kit.box("tw-job"), "job") as place:
        place.props["data-job"] = job_id
        kit.spinner("Loading the job…")
    parts: list[Parts] = []

    def draw() -> None:
        view = feed.look()
        if view.job is None:
            show_problem(place, feed)
            return
        if not parts:
            place.clear()
            with place:
                parts.append(build_parts())
        if parts[0].changed("version", (feed.version, parts[0].steps)):
            update(session, feed, parts[0], view)

    kit.every(0.5, draw)


def show_problem(place: Element, feed: Feed[JobView]) -> None:
    if feed.error is not None and feed.error.status:
        place.clear()
        with place:
            kit.error_box(feed.error.message, "This job cannot be shown.")


def build_parts() -> Parts:
    head = kit.box("tw-job-head")
    with kit.tag(kit.box("tw-job-progress"), "progress") as progress:
        bar = kit.progress("progress-bar")
        words = kit.tag(kit.Text("", "tw-progress-words"), "progress-words")
    with kit.card("Stages") as stages_card:
        stages = kit.box()
    with kit.box("tw-charts") as charts:
        with kit.card("Loss"):
            loss = LineChart("Loss", LOSS_LINES, "loss-chart")
        with kit.card("Token accuracy (%)"):
            accuracy = LineChart("Token accuracy in percent", ACCURACY_LINES, "accuracy-chart", digits=1, scale=100.0)
    with kit.box("tw-two"):
        with kit.box("tw-stack"):
            with kit.card("Checkpoints"):
                checkpoints = kit.box()
            with kit.card("Events", "tw-events-card"):
                steps = ui.switch("Every step").props("dense size=xs").classes("tw-steps")
                with kit.scrollable(kit.box("tw-events"), "Events, newest first"):
                    events = kit.tag(kit.box(kind="ol"), "events")
        with kit.card("Details"):
            details = kit.box()
    stages_card.bind_visibility_from(stages, "visible")
    parts = Parts(head, progress, bar, words, stages, charts, loss, accuracy, checkpoints, details, events)
    steps.on_value_change(lambda e: setattr(parts, "steps", e.value))
    kit.tag(steps, "every-step")
    return parts


def update(session: Session, feed: Feed[JobView], parts: Parts, view: JobView) -> None:
    job = view.job
    assert job is not None
    if parts.changed("head", (job["status"], job["fine_tuned_model"], job["result_files"], job["error"])):
        refill(parts.head, lambda: build_head(session, feed, job))
    update_stages(parts, job)
    update_progress(parts, job, view.points)
    update_charts(parts, job, view.points)
    if parts.changed("checkpoints", [c["id"] for c in view.checkpoints] or job["status"]):
        refill(parts.checkpoints, lambda: build_checkpoints(job, view.checkpoints))
    if parts.changed("facts", {**job, "status": None}):
        refill(parts.facts, lambda: build_facts(job))
    update_events(parts, view.events)


def refill(place: Element, make: Any) -> None:
    place.clear()
    with place:
        make()


# --- head ------------------------------------------------------------------------------------------------------------


def build_head(session: Session, feed: Feed[JobView], job: dict[str, Any]) -> None:
    with kit.box("tw-job-title"):
        with kit.box("tw-title-line"):
            kit.heading(title_of(job), 1, "tw-ellipsis")
            kit.chip(job["status"])
        with kit.box("tw-job-id"):
            kit.copyable(job["id"], "the job id")
            if job["fine_tuned_model"]:
                with kit.tag(kit.box(), "tuned-model"):
                    kit.copyable(job["fine_tuned_model"], "the model name")
    with kit.box("tw-actions"):
        if job["fine_tuned_model"]:
            target = playground_path(job, job["fine_tuned_model"])
            kit.button(
                "Open in playground", lambda: kit.go(target), icon="forum", kind="primary", name="open-playground"
            )
        for action in ("resume",) if failed_chain(job) else POSSIBLE.get(job["status"], ()):
            build_action(session, feed, job["id"], action)
    if job["error"] and job["error"].get("message"):
        kit.error_box(job["error"]["message"], "The job failed.", name="job-error")


def failed_chain(job: dict[str, Any]) -> bool:
    """Its failed stage can be done again."""
    return job["status"] == "failed" and any(s["id"] for s in stages_of(job))


def build_action(session: Session, feed: Feed[JobView], job_id: str, action: str) -> None:
    words, icon, kind, question, explanation = ACTIONS[action]

    async def act() -> None:
        if question and not await kit.confirm(
            question, explanation, words, "danger" if kind == "danger" else "primary"
        ):
            return
        await session.api.act(job_id, action)
        feed.hurry()
        session.jobs().hurry()

    kit.button(words, act, icon=icon, kind=kind, name=f"{action}-job")


def playground_path(job: dict[str, Any], model: str) -> str:
    return f"/playground?model={quote(model, safe='')}&base={quote(job['model'], safe='')}"


# --- progress --------------------------------------------------------------------------------------------------------


def update_stages(parts: Parts, job: dict[str, Any]) -> None:
    stages = stages_of(job)
    parts.stages.set_visibility(bool(stages))
    if stages and parts.changed("stages", stages):
        refill(parts.stages, lambda: build_stages(stages))


def update_progress(parts: Parts, job: dict[str, Any], points: list[dict[str, Any]]) -> None:
    newest = points[-1] if points else None
    stages = stages_of(job)
    active = job["status"] in (*ACTIVE, "paused")
    parts.progress.set_visibility(active)
    if active and stages:
        parts.bar.set_value(share_done(stages))
        parts.bar_words.set_text(chain_words(stages))
    elif active and parts.changed("progress", (job["status"], newest)):
        parts.bar.set_value(newest["step"] / newest["total_steps"] if newest else 0)
        parts.bar_words.set_text(progress_words(job, newest))


def progress_words(job: dict[str, Any], newest: dict[str, Any] | None) -> str:
    """`Step 34 of 114 · 2 min 32 s left · 812 tokens/s`."""
    if newest is None:
        return WAITING.get(job["status"], "Waiting to start.")
    words = [f"Step {newest['step']} of {newest['total_steps']}"]
    if job["status"] == "paused":
        return f"Paused at step {newest['step']} of {newest['total_steps']}"
    if newest.get("eta_s") is not None:
        words.append(f"{duration(newest['eta_s'])} left")
    if newest.get("tokens_per_second") is not None:
        words.append(f"{count(newest['tokens_per_second'])} tokens/s")
    return " · ".join(words)


def update_charts(parts: Parts, job: dict[str, Any], points: list[dict[str, Any]]) -> None:
    parts.charts.set_visibility(bool(points) or (job["status"] in (*ACTIVE, "paused") and not stages_of(job)))
    total = points[-1]["total_steps"] if points else None
    parts.loss.show({key: series(points, key) for key in LOSS_LINES}, total)
    parts.accuracy.show({key: series(points, key) for key in ACCURACY_LINES}, total)
    for chart in MORE:
        found = {key: series(points, key) for key in chart.lines}
        if chart.name not in parts.more and any(found.values()):
            with parts.charts, kit.card(chart.title):
                parts.more[chart.name] = LineChart(chart.title, chart.lines, chart.name, chart.digits, chart.scale)
        if chart.name in parts.more:
            parts.more[chart.name].show(found, total)


# --- checkpoints, details, events ------------------------------------------------------------------------------------


def build_checkpoints(job: dict[str, Any], checkpoints: list[dict[str, Any]]) -> None:
    if not checkpoints:
        ended = job["status"] not in (*ACTIVE, "paused")
        kit.Text("This job left none." if ended else "One appears at the end of each epoch.", "tw-muted")
        return
    columns = ("Step", "Loss", "Validation", "Accuracy", "")
    kit.table(columns, [checkpoint_row(job, c) for c in checkpoints], "Checkpoints by step", "checkpoints")


def checkpoint_row(job: dict[str, Any], checkpoint: dict[str, Any]) -> tuple[Any, ...]:
    metrics = checkpoint["metrics"]
    model = checkpoint["fine_tuned_model_checkpoint"]

    def links() -> None:
        kit.tag(kit.link("Open in playground", playground_path(job, model), "tw-link"), "checkpoint-playground")
        kit.icon_button("content_copy", f"Copy the model name {model}", lambda: kit.copy(model, "the model name"))

    return (
        checkpoint["step_number"],
        number(metrics.get("train_loss")),
        number(metrics.get("full_valid_loss", metrics.get("valid_loss"))),
        percent(metrics.get("full_valid_mean_token_accuracy", metrics.get("train_mean_token_accuracy"))),
        links,
    )


def build_facts(job: dict[str, Any]) -> None:
    hyper = job.get("hyperparameters") or {}
    rows: list[tuple[str, Any]] = [("Base model", job["model"])]
    rows += [("Created", clock(job["created_at"]))]
    chain = chain_of(job)
    if chain:
        words = f"{chain['stage']} of {chain['id']}"
        rows.append(("Stage", lambda: kit.tag(kit.link(words, f"/jobs/{chain['id']}", "tw-link"), "chain-link")))
    if job["finished_at"]:
        rows.append(
            ("Finished", f"{clock(job['finished_at'])} (after {duration(job['finished_at'] - job['created_at'])})")
        )
    rows += own_rows(job)
    numbers = {"n_epochs": "Epochs", "batch_size": "Batch size", "learning_rate_multiplier": "Learning-rate multiplier"}
    rows += [] if stages_of(job) else [(words, hyper.get(key, "–")) for key, words in numbers.items()]
    rows += [
        ("Seed", job.get("seed", "–")),
        ("Trained tokens", count(job["trained_tokens"])),
        ("Training file", lambda: file_link(job["training_file"])),
    ]
    if job["validation_file"]:
        rows.append(("Validation file", lambda: file_link(job["validation_file"])))
    for file_id in job["result_files"]:
        rows.append(("Metrics as CSV", lambda f=file_id: file_link(f, "Download", "download-result")))
    kit.facts(rows, "facts")


def own_rows(job: dict[str, Any]) -> list[tuple[str, str]]:
    """The resolved parts that our own object of the job tells: tuner, objective, optimizer, schedule, …"""
    own = job.get("tunewright") or {}
    rows = []
    for key in ("objective", "tuner", "optimizer", "schedule", "learning_rate", "max_length", "dtype", "quantization"):
        value = own.get(key)
        if value not in (None, "", {}):
            rows.append((key.replace("_", " ").capitalize(), part_words(value)))
    return rows


def part_words(value: Any) -> str:
    """`lora · r 16 · alpha 32` from {"name": "lora", "r": 16, "alpha": 32}."""
    if not isinstance(value, dict):
        return f"{value:g}" if isinstance(value, float) else str(value)
    options = {**value.get("options", {}), **{k: v for k, v in value.items() if k not in ("name", "options")}}
    return " · ".join(
        [str(value.get("name", "")), *(f"{k} {v}" for k, v in options.items() if v not in (None, [], {}))]
    )


def file_link(file_id: str, words: str = "", name: str = "download-file") -> None:
    kit.download_link(words or file_id, f"/files/{quote(file_id, safe='')}/download", name)


def update_events(parts: Parts, events: list[dict[str, Any]]) -> None:
    """Put new events on top; the list is drawn anew only when the switch changes."""
    wanted = [e for e in events if parts.steps or e.get("type") != "metrics"][:MAX_EVENTS]
    before = parts.shown.get("events", (None, []))
    if before[0] != parts.steps:
        parts.events.clear()
        before = (parts.steps, [])
    known = set(before[1])
    fresh = [e for e in wanted if e["id"] not in known]
    with parts.events:
        for event in reversed(fresh):
            build_event(event).move(target_index=0)
    children = parts.events.default_slot.children
    for extra in children[MAX_EVENTS:]:
        extra.delete()
    parts.shown["events"] = (parts.steps, [e["id"] for e in wanted])


def build_event(event: dict[str, Any]) -> Element:
    with kit.box(f"tw-event tw-event-{event['level']}", "li") as row:
        kit.Text(clock(event["created_at"]), "tw-event-time", "time")
        kit.Text(event["message"], "tw-event-text")
    return row

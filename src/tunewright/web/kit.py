"""The dashboard's building blocks over NiceGUI, whose quirks all live here. Text is always text, never HTML."""

from __future__ import annotations

import html
import inspect
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from nicegui import app, background_tasks, events, ui
from nicegui.element import Element
from nicegui.elements.sub_pages import SubPages

from tunewright.core.errors import TunewrightError
from tunewright.web.client import ApiDown
from tunewright.web.elements import Choices, Text

E = TypeVar("E", bound=Element)

STATIC = Path(__file__).parent / "static"
RETRY_SECONDS = 2.0

# status -> (what people read, colour class, icon); colour is never the only sign
STATUSES = {
    "validating_files": ("Validating files", "neutral", "rule"),
    "queued": ("Queued", "neutral", "schedule"),
    "waiting": ("Waiting", "neutral", "schedule"),
    "running": ("Running", "accent", "autorenew"),
    "pausing": ("Pausing", "warn", "pause"),
    "paused": ("Paused", "warn", "pause"),
    "cancelling": ("Cancelling", "neutral", "block"),
    "cancelled": ("Cancelled", "neutral", "block"),
    "succeeded": ("Succeeded", "good", "check_circle"),
    "failed": ("Failed", "bad", "error"),
}


# --- elements --------------------------------------------------------------------------------------------------------


def tag(element: E, name: str) -> E:
    """Give an element its stable name for tests: `data-testid` in the browser, a mark in NiceGUI."""
    element.props["data-testid"] = name
    return element.mark(name)


def box(classes: str = "", kind: str = "div") -> Element:
    """A plain HTML element without NiceGUI's own spacing."""
    return ui.element(kind).classes(classes)


def heading(text: str, level: int = 2, classes: str = "") -> Text:
    return Text(text, classes, f"h{level}")


def button(
    text: str,
    on_click: Callable[..., Any] | None = None,
    *,
    icon: str | None = None,
    kind: str = "plain",
    name: str | None = None,
) -> ui.button:
    """kind: `primary` (one a view), `plain`, `danger` or `quiet`."""
    # color=None: Quasar's colour classes are `!important` and would win over ours
    made = ui.button(text, on_click=guarded(on_click) if on_click else None, icon=icon, color=None)
    made.props("unelevated no-caps no-wrap").classes(f"tw-btn tw-btn-{kind}")
    return tag(made, name) if name else made


def icon_button(icon: str, label: str, on_click: Callable[..., Any], name: str | None = None) -> ui.button:
    """A round button whose meaning is `label`: tooltip and accessible name."""
    made = ui.button(icon=icon, on_click=guarded(on_click), color=None)
    made.props("flat round dense size=sm").classes("tw-icon-btn")
    made.props["aria-label"] = label
    made.tooltip(label)
    return tag(made, name) if name else made


def chip(status: str) -> Element:
    """A job status as a coloured word with an icon."""
    words, colour, icon = STATUSES.get(status, (status, "neutral", "help"))
    with tag(box(f"tw-chip tw-chip-{colour}", "span"), "status") as made:
        made.props["data-status"] = status
        ui.icon(icon).props("aria-hidden=true")
        Text(words)
    return made


def card(title: str = "", classes: str = "", name: str | None = None) -> Element:
    """A bordered section with an optional heading."""
    made = box(f"tw-card {classes}", "section")
    if title:
        made.props["aria-label"] = title
        with made:
            heading(title, 2, "tw-card-title")
    return tag(made, name) if name else made


def empty_state(icon: str, title: str, text: str) -> Element:
    """What a place without content says: what belongs here and what to do next. Buttons go inside."""
    with box("tw-empty") as made:
        ui.icon(icon).classes("tw-empty-icon").props("aria-hidden=true")
        heading(title, 2)
        Text(text, kind="p")
    return made


def error_box(message: str, title: str = "", name: str = "error") -> Element:
    """An error that stays on the page."""
    with tag(box("tw-error"), name) as made:
        made.props["role"] = "alert"
        ui.icon("error").props("aria-hidden=true")
        with box("tw-error-text"):
            if title:
                Text(title, "tw-error-title", "strong")
            Text(message, "tw-prewrap")
    return made


def scrollable(place: E, label: str) -> E:
    """A place with a scroll bar of its own, which the keyboard can reach too."""
    place.props["tabindex"] = "0"
    place.props["role"] = "region"
    place.props["aria-label"] = label
    return place


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], label: str, name: str) -> Element:
    """A real HTML table. A cell is text, or a function that builds elements inside the cell."""
    with tag(scrollable(box("tw-table-wrap"), label), name) as made, box("tw-table", "table") as grid:
        grid.props["aria-label"] = label
        with box(kind="thead"), box(kind="tr"):
            for column in columns:
                Text(column, kind="th").props["scope"] = "col"
        with box(kind="tbody"):
            for row in rows:
                with box(kind="tr"):
                    for cell in row:
                        _cell(cell)
    return made


def _cell(cell: Any) -> None:
    if callable(cell):
        with box(kind="td"):
            cell()
    else:
        Text(cell, kind="td")


def facts(rows: Iterable[tuple[str, Any]], name: str) -> Element:
    """Names and values in two columns; a value is text or a function that builds elements."""
    with tag(box("tw-facts", "dl"), name) as made:
        for key, value in rows:
            Text(key, kind="dt")
            with box(kind="dd"):
                value() if callable(value) else Text(value)
    return made


def copyable(text: str, label: str) -> None:
    """A short code with a button that copies it."""
    with box("tw-copyable", "span"):
        Text(text, "tw-mono")
        icon_button("content_copy", f"Copy {label}", lambda: copy(text, label))


def copy(text: str, label: str) -> None:
    ui.clipboard.write(text)
    notify(f"Copied {label}.")


def field(label: str, help: str = "") -> Element:
    """A labelled place for one input."""
    with box("tw-field") as made:
        Text(label, "tw-field-label").props["aria-hidden"] = "true"
    if help:
        with made:
            Text(help, "tw-field-help")
    return made


def dress(control: Any, label: str, name: str) -> Any:
    """The common look of an input, its accessible name and its test hook."""
    control.props("outlined dense").classes("tw-input")
    control.props["aria-label"] = label
    return tag(control, name)


def text_input(
    label: str, value: str, on_change: Callable[[Any], Any], *, name: str, placeholder: str = ""
) -> ui.input:
    return dress(ui.input(value=value, placeholder=placeholder, on_change=lambda e: on_change(e.value)), label, name)


def text_area(
    label: str, value: str, on_change: Callable[[Any], Any], *, name: str, placeholder: str = ""
) -> ui.textarea:
    made = ui.textarea(value=value, placeholder=placeholder, on_change=lambda e: on_change(e.value))
    return dress(made.props("autogrow"), label, name)


def select(
    label: str,
    options: dict[Any, str],
    value: Any,
    on_change: Callable[[Any], Any],
    *,
    name: str,
    search: bool = False,
    unfit: dict[Any, str] | None = None,
) -> Choices:
    """A drop-down. A value that is not among the options is shown as nothing chosen."""
    chosen = value if value in options else None
    made = Choices(options, chosen, unfit or {}, with_input=search, on_change=lambda e: on_change(e.value))
    return dress(made.props("options-dense"), label, name)


def select_many(
    label: str, options: dict[Any, str], values: Sequence[Any], on_change: Callable[[Any], Any], *, name: str
) -> Choices:
    """A drop-down of which several entries can be chosen."""
    chosen = [v for v in values if v in options]
    made = Choices(options, chosen, {}, multiple=True, on_change=lambda e: on_change(e.value))
    return dress(made.props("options-dense use-chips"), label, name)


def drop_zone(
    words: str, on_upload: Callable[[events.UploadEventArguments], Any], *, accept: str, name: str
) -> ui.upload:
    """A place to drop one file on, which is also a button to choose one; it is sent at once."""
    made = ui.upload(on_upload=on_upload, auto_upload=True, max_files=1).props("flat bordered").classes("tw-drop")
    made.props["accept"] = accept
    made.on_rejected(lambda: notify(f"Only one file of the kinds {accept} can be used.", "negative"))
    template = """
        <div class="tw-drop-inner">
          <q-icon name="upload_file" class="tw-drop-icon" aria-hidden="true"></q-icon>
          <label class="tw-grow"><q-uploader-add-trigger></q-uploader-add-trigger>%s</label>
          <q-btn unelevated no-caps dense class="tw-btn tw-btn-plain" label="Choose a file" @click="props.pickFiles" />
        </div>
    """
    made.add_slot("header", template % html.escape(words))
    made.add_slot("list", "<span></span>")
    return tag(made, name)


def choice(options: Sequence[str], value: str, on_change: Callable[[str], Any], *, name: str) -> ui.toggle:
    """A few words of which one is chosen."""
    made = ui.toggle(list(options), value=value, on_change=lambda e: on_change(e.value))
    made.props("no-caps unelevated dense spread toggle-color=tw-on toggle-text-color=tw-on").classes("tw-toggle")
    return tag(made, name)


def progress(name: str) -> ui.linear_progress:
    made = ui.linear_progress(value=0, show_value=False).props("rounded").classes("tw-progress")
    made.props["aria-label"] = "Progress"
    return tag(made, name)


def spinner(text: str) -> Element:
    with box("tw-loading") as made:
        ui.spinner(size="1.4em").props("aria-hidden=true")
        Text(text)
    made.props["role"] = "status"
    return made


def code(text: str) -> None:
    """Source code as it is. (`ui.code` goes through Markdown, which a fence inside the text would break.)"""
    Text(text, "tw-code", "pre").props["tabindex"] = "0"


def link(text: str, target: str, classes: str = "") -> Element:
    """A link to one of our own pages. target: a path that starts with `/`, its parts already quoted."""
    made = Text(text, classes, "a")
    made.props["href"] = target
    return made


def download_link(text: str, target: str, name: str) -> Element:
    """A link that saves a file; the dashboard's router leaves it alone."""
    made = tag(link(text, target, "tw-link"), name)
    made.props["download"] = True
    return made


# --- behaviour -------------------------------------------------------------------------------------------------------


def notify(message: str, kind: str = "info") -> None:
    """A short message at the foot of the page. kind: `info`, `positive` or `negative`."""
    ui.notify(message, type=kind, multi_line=True, close_button=kind == "negative", position="bottom")  # pyright: ignore


def guarded(handler: Callable[..., Any]) -> Callable[..., Any]:
    """The handler with our own errors shown to the user instead of logged."""
    takes_event = any(p.default is p.empty for p in inspect.signature(handler).parameters.values())

    async def run(event: Any) -> None:
        try:
            result = handler(event) if takes_event else handler()
            if inspect.isawaitable(result):
                await result
        except TunewrightError as e:
            notify(e.message, "negative")

    return run


async def confirm(title: str, text: str, yes: str, kind: str = "danger") -> bool:
    """Ask before doing something that matters."""
    with ui.dialog() as dialog, box("tw-dialog"):
        heading(title, 2)
        Text(text, kind="p")
        with box("tw-actions tw-actions-end"):
            button("Keep as it is", lambda: dialog.submit(False), kind="quiet", name="confirm-no")
            button(yes, lambda: dialog.submit(True), kind=kind, name="confirm-yes")
    answer = bool(await dialog)
    dialog.delete()
    return answer


def every(seconds: float, step: Callable[[], Any]) -> ui.timer:
    """Call `step` now and then again while this page is open."""
    return ui.timer(seconds, step)


def spawn(work: Awaitable[Any], place: Element) -> None:
    """Run in the background inside `place`."""
    background_tasks.create(work, name="page work", context=place)


def load(place: Element, fetch: Callable[[], Awaitable[Any]], build: Callable[[Any], None]) -> None:
    """Fill `place` with what `build` makes of `fetch()`; waits for an API that does not answer yet."""

    async def attempt() -> None:
        try:
            value = await fetch()
        except ApiDown as down:
            _refill(place, spinner, down.message)
            return
        except TunewrightError as error:
            timer.cancel()
            _refill(place, error_box, error.message, "This page could not be loaded.")
            return
        timer.cancel()
        _refill(place, build, value)

    with place:
        spinner("Loading…")
    with place.parent_slot.parent if place.parent_slot else place:
        timer = ui.timer(RETRY_SECONDS, attempt)


def _refill(place: Element, build: Callable[..., Any], *values: Any) -> None:
    place.clear()
    with place:
        build(*values)


def go(path: str) -> None:
    """Show another of our own pages."""
    ui.navigate.to(path)


def reopen(path: str) -> None:
    """Load a page of ours from the server, as after signing in or out."""
    ui.context.client.open(path)


def current_path() -> str:
    return ui.context.client.sub_pages_router.current_path.partition("?")[0]


def on_path(handler: Callable[[str], None]) -> None:
    """Call `handler` with the path at each change of page."""
    ui.context.client.sub_pages_router.on_path_changed(lambda path: handler(path.partition("?")[0]))


class Pages(SubPages):
    """The place where the pages appear, with our own words for an unknown address."""

    def _render_404(self) -> None:
        with empty_state("explore_off", "There is nothing at this address", "The page may have moved."):
            link("Go to your jobs", "/jobs", "tw-link")


def page_style() -> None:
    """Fonts, colours and spacing of every page; light or dark as the browser prefers."""
    ui.colors(primary="#0f766e", positive="#15803d", negative="#b42318", info="#334155", warning="#b45309")
    ui.add_css(STATIC / "tunewright.css")


def serve_static() -> None:
    app.add_static_files("/static", STATIC)

"""The playground: one question to two models side by side, usually the base and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nicegui import ui
from nicegui.element import Element

from tunewright.web import kit
from tunewright.web.chat import Chat, as_python
from tunewright.web.desk import SIDES, Session


@dataclass
class Column:
    """The changing places of one column. drawn: the chat's version that they show."""

    chat: Chat
    log: Element
    note: kit.Text
    answer: kit.Text | None = None
    drawn: int = -1
    n_messages: int = -1


def build(session: Session, model: str = "", base: str = "") -> None:
    with kit.box("tw-playground") as place:
        pass
    kit.load(place, session.api.models, lambda models: build_all(session, models, model, base))


def build_all(session: Session, models: list[dict[str, Any]], model: str, base: str) -> None:
    names = [m["id"] for m in models]
    chats = session.chats()
    choose_models(chats, names, model, base)
    if not names:
        kit.empty_state(
            "forum", "There is no model to talk to", "See `tunewright models` for what this server can load."
        )
        return
    kit.heading("Playground", 1, "tw-unseen")
    with kit.box("tw-columns"):
        columns = [build_column(session, side, chats[side], names) for side in SIDES]
    build_composer(session, columns)
    saved = [c.chat.version for c in columns]

    def draw() -> None:
        for column in columns:
            draw_column(column)
        now = [c.chat.version for c in columns]
        if now != saved and not any(c.chat.running for c in columns):
            saved[:] = now
            session.save_chats()

    kit.every(0.1, draw)


def choose_models(chats: dict[str, Chat], names: list[str], model: str, base: str) -> None:
    """The models of the link; else those of before; else the first base model beside the newest tuned one."""
    tuned = [n for n in names if n.startswith("ft:")]
    plain = [n for n in names if not n.startswith("ft:")]
    defaults = {"left": (plain or names or [""])[0], "right": (tuned or plain or [""])[0]}
    for side, wanted in (("left", base), ("right", model)):
        settings = chats[side].settings
        if wanted in names and settings.model != wanted:
            settings.model = wanted
            chats[side].clear()
        if settings.model not in names:
            settings.model = defaults[side]


def build_column(session: Session, side: str, chat: Chat, names: list[str]) -> Column:
    settings = chat.settings

    def set_setting(key: str, value: Any) -> None:
        setattr(settings, key, value)
        session.save_chats()

    with kit.tag(kit.box("tw-column", "section"), f"column-{side}") as column:
        column.props["aria-label"] = f"{side.capitalize()} model"
        with kit.box("tw-column-head"):
            chosen = kit.select(
                f"{side.capitalize()} model",
                {n: n for n in names},
                settings.model,
                lambda v: set_setting("model", v or ""),
                name=f"model-{side}",
                search=True,
            )
            chosen.classes("tw-grow")
            kit.icon_button("code", "Copy as Python code", lambda: show_code(session, chat), f"code-{side}")
            kit.icon_button("delete_sweep", "Clear this conversation", chat.clear, f"clear-{side}")
        build_settings(side, chat, set_setting)
        log = kit.tag(kit.scrollable(kit.box("tw-log"), f"Conversation, {side}"), f"log-{side}")
        log.props["aria-live"] = "polite"
        note = kit.tag(kit.Text("", "tw-note"), f"note-{side}")
    return Column(chat, log, note)


def build_settings(side: str, chat: Chat, set_setting: Any) -> None:
    settings = chat.settings
    with kit.box("tw-settings"):
        system = kit.text_area(
            "System prompt",
            settings.system,
            lambda v: set_setting("system", v or ""),
            name=f"system-{side}",
            placeholder="System prompt (optional)",
        )
        system.classes("tw-grow").props("debounce=300")
        for key, label, low, high, step in (
            ("temperature", "Temperature", 0, 2, 0.1),
            ("max_tokens", "Max tokens", 1, 8192, 1),
        ):
            whole = step == 1
            control = ui.number(
                label,
                value=getattr(settings, key),
                min=low,
                max=high,
                step=step,
                precision=0 if whole else 2,
                on_change=lambda e, k=key, w=whole: number_changed(set_setting, k, e.value, w),
            )
            kit.dress(control.props("stack-label debounce=300"), label, f"{key}-{side}").classes("tw-number")


def number_changed(set_setting: Any, key: str, value: float | None, whole: bool) -> None:
    if value is not None:
        set_setting(key, int(value) if whole else float(value))


def build_composer(session: Session, columns: list[Column]) -> None:
    store = session.store
    with kit.box("tw-composer"):
        text = kit.text_area(
            "Message to both models",
            store.get("question") or "",
            lambda v: store.update(question=v or ""),
            name="question",
            placeholder="Ask both models the same thing…",
        ).classes("tw-grow")

        async def send() -> None:
            asked = text.value or ""
            if not asked.strip() or any(c.chat.running for c in columns):
                return
            for column in columns:
                column.chat.ask(session.api, asked)
            text.set_value("")
            session.save_chats()

        def stop() -> None:
            for column in columns:
                column.chat.stop()

        text.on("keydown.enter.exact.prevent", kit.guarded(send))
        sender = kit.button("Send", send, icon="send", kind="primary", name="send")
        stopper = kit.button("Stop", stop, icon="stop", kind="plain", name="stop")

        def swap() -> None:
            running = any(c.chat.running for c in columns)
            sender.set_visibility(not running)
            stopper.set_visibility(running)

        kit.every(0.1, swap)


# --- the conversation ------------------------------------------------------------------------------------------------


def draw_column(column: Column) -> None:
    """Show what is new: usually only the last answer's text."""
    chat = column.chat
    state = (chat.version, chat.running)
    if column.drawn == hash(state):
        return
    column.drawn = hash(state)
    if column.n_messages != len(chat.messages) or column.answer is None or chat.error:
        redraw(column)
    elif chat.messages:
        column.answer.set_text(chat.messages[-1]["content"])
    column.note.set_text(chat.note or ("answering…" if chat.running else ""))


def redraw(column: Column) -> None:
    chat = column.chat
    column.log.clear()
    column.n_messages, column.answer = len(chat.messages), None
    with column.log:
        if not chat.messages and not chat.error:
            kit.Text("The conversation appears here.", "tw-muted")
        for message in chat.messages:
            column.answer = build_message(message)
        if chat.error:
            kit.error_box(chat.error)


def build_message(message: dict[str, str]) -> kit.Text:
    role = message["role"]
    with kit.tag(kit.box(f"tw-message tw-message-{role}"), f"message-{role}"):
        kit.Text({"user": "You", "assistant": "Model"}.get(role, role), "tw-message-role")
        return kit.Text(message["content"], "tw-prewrap tw-message-text")


async def show_code(session: Session, chat: Chat) -> None:
    """A script that asks the same through the API."""
    source = as_python(session.api.base_url, chat.settings, chat.messages, keyed=not session.desk.public)
    with ui.dialog() as dialog, kit.tag(kit.box("tw-dialog tw-dialog-wide"), "code-dialog"):
        kit.heading("The same with the openai package", 2)
        kit.code(source)
        with kit.box("tw-actions tw-actions-end"):
            kit.button("Copy", lambda: kit.copy(source, "the code"), icon="content_copy", kind="primary")
            kit.button("Close", dialog.close, kind="quiet")
    await dialog
    dialog.delete()

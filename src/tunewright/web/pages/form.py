"""What the create pages share: the draft, which survives a reload, and inputs for a table's row and its options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nicegui import ui

from tunewright.web import kit
from tunewright.web.desk import Session
from tunewright.web.forms import FormField, default_part, fields, shown
from tunewright.web.rules import unfit

KIND_LABELS = {
    "objective": "Objective",
    "tuner": "What is trained",
    "optimizer": "Optimizer",
    "schedule": "Schedule",
    "quantization": "How the base is held",
    "recipe": "Recipe",
}
LEAVES = {
    "adapter": "leaves a small adapter, served beside its base",
    "delta": "leaves the changed weights alone, served beside its base",
    "weights": "leaves a whole model of its own",
}


@dataclass
class Form:
    """A page's state: the draft, what can be chosen, and the places that depend on it.

    key: where the session keeps the draft. describe: the tables. models: names, base models first, those whose weights
    are there before the others.
    """

    session: Session
    key: str
    describe: dict[str, Any]
    models: list[str]
    files: list[dict[str, Any]]
    refresh: list[Callable[[], None]] = field(default_factory=list)
    draft: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.draft = dict(self.session.store.get(self.key) or {})
        if self.draft.get("model") not in self.models:
            self.draft["model"] = self.models[0] if self.models else None

    def set(self, name: str, value: Any) -> None:
        """Change the draft, keep it, and redraw what shows it."""
        self.draft[name] = value
        self.keep()

    def keep(self) -> None:
        self.session.store[self.key] = self.draft
        for step in self.refresh:
            step()

    def part(self, kind: str) -> str:
        return self.draft.get(kind) or default_part(kind, self.describe)

    def texts(self, key: str) -> dict[str, Any]:
        """The touched inputs of an option block."""
        return self.draft.setdefault("options", {}).setdefault(key, {})

    def new_id(self) -> int:
        """A number that no file or method of this draft has had."""
        self.draft["last_id"] = self.draft.get("last_id", 0) + 1
        return self.draft["last_id"]


async def open_form(session: Session, key: str, *purposes: str) -> Form:
    """The form of a page, with what the server has. purposes: of the files that it may use. Raises ApiError."""
    told, models = await session.api.describe(), await session.api.models()
    ready = {m["id"] for m in told["models"] if m["ready"]}
    names = sorted((m["id"] for m in models), key=lambda name: (name.startswith("ft:"), name not in ready))
    return Form(session, key, told["parts"], names, await session.api.files(*purposes))


def build_part(form: Form, kind: str, build_more: Callable[[str, dict[str, Any]], None] | None = None) -> None:
    """One table: which row, what it is, and its options folded away. build_more: what else a row asks for."""
    rows = form.describe[kind]
    if form.draft.get(kind) not in rows:
        form.draft[kind] = default_part(kind, form.describe)
    label = KIND_LABELS[kind]
    with kit.field(label):
        options = {name: row_title(name, row) for name, row in sorted(rows.items())}
        now = unfit(kind, form.draft, form.describe)
        select = kit.select(label, options, form.draft[kind], lambda v: chosen(v), name=kind, unfit=now)
        words = kit.tag(kit.Text("", "tw-muted tw-small"), f"{kind}-words")
        place = kit.box()
    form.refresh.append(lambda: select.set_unfit(unfit(kind, form.draft, form.describe)))

    def chosen(name: str | None) -> None:
        if name is not None:
            form.set(kind, name)
            draw()

    def draw() -> None:
        name = form.part(kind)
        words.set_text(row_words(rows[name]))
        place.clear()
        with place:
            if build_more is not None:
                build_more(name, rows[name])
            build_options(form, kind, name, rows[name], f"{kind}.{name}")

    draw()


def row_title(name: str, row: dict[str, Any]) -> str:
    title = row.get("card", {}).get("title")
    return f"{title} ({name})" if title and title.lower() != name else title or name


def row_words(row: dict[str, Any]) -> str:
    """What a row is; of a tuner also what it leaves and its usual learning rate."""
    card = row.get("card", {})
    said = [row.get("doc") or card.get("summary") or ""]
    said += [LEAVES[card["artefact"]]] if card.get("artefact") in LEAVES else []
    said += [f"usual learning rate {card['default_lr']:g}"] if card.get("default_lr") else []
    return " · ".join(s.rstrip(".") for s in said if s)


def build_options(form: Form, prefix: str, name: str, row: dict[str, Any], key: str) -> None:
    """The options of a row, folded away. prefix: of their names in tests. key: of their place in the draft."""
    known = fields(row)
    if not known:
        return
    texts = form.texts(key)
    with ui.expansion(f"Options of {name}").classes("tw-options").props("dense") as folded:
        kit.tag(folded, f"options-{prefix}")
        with kit.box("tw-grid"):
            for one in known:
                with kit.field(one.label, one.help):
                    build_option(form, prefix, one, texts)


def build_option(form: Form, prefix: str, one: FormField, texts: dict[str, Any]) -> None:
    name = f"{prefix}-{one.name}"
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
        typed(one.label, text, keep, name, "none" if one.optional else "")


def typed(label: str, value: str, keep: Callable[[Any], Any], name: str, hint: str = "") -> ui.input:
    """A line of text that reports once the typing rests."""
    return kit.text_input(label, value, keep, name=name, placeholder=hint).props("debounce=200")


def build_lines(form: Form, rows: dict[str, tuple[str, str, str]]) -> None:
    """Lines of text of the draft. rows: key -> (label, help, hint)."""
    with kit.box("tw-grid"):
        for key, (label, help, hint) in rows.items():
            with kit.field(label, help):
                typed(label, form.draft.get(key) or "", lambda v, k=key: form.set(k, v), key, hint)

"""Of a new job: what is learned beside the training data. Methods against forgetting, and further training files."""

from __future__ import annotations

from typing import Any

from nicegui.element import Element

from tunewright.web import kit
from tunewright.web.pages.data import Role, build_data
from tunewright.web.pages.form import Form, build_options, row_title, row_words, typed
from tunewright.web.rules import unfit

ROWS = {
    "required": "Rows of what must stay",
    "optional": "Rows of what must stay (optional: without them it works on the training rows)",
}
MOST = 8  # methods, and further files


def retain_role(entry: dict[str, Any]) -> str:
    return f"retain-{entry['id']}"


def roles(draft: dict[str, Any]) -> dict[str, str]:
    """key of the draft -> what its file is, of every file beside training and validation data."""
    kept = {retain_role(e): f"Rows for {e['name']}" for e in draft.get("retain") or []}
    ids = (draft.get("mix") or {}).get("ids") or []
    return {**kept, **{f"mix-{i}": f"Further training file {n}" for n, i in enumerate(ids, 1)}}


# --- against forgetting ----------------------------------------------------------------------------------------------


def build_retain(form: Form) -> None:
    """Any number of methods; each can be removed."""
    rows = form.describe["retain"]
    with kit.field("Against forgetting", "What the model can do already stays better. Any number of methods."):
        place = kit.tag(kit.box("tw-stack"), "retain")

    def add(name: str | None) -> None:
        if name is not None:
            form.set("retain", [*(form.draft.get("retain") or []), {"id": form.new_id(), "name": name}])
            draw()

    def remove(entry: dict[str, Any]) -> None:
        form.draft.pop(retain_role(entry), None)
        form.set("retain", [e for e in form.draft["retain"] if e["id"] != entry["id"]])
        draw()

    def draw() -> None:
        entries = form.draft["retain"] = [e for e in form.draft.get("retain") or [] if e["name"] in rows]
        place.clear()
        with place:
            for number, entry in enumerate(entries, 1):
                build_method(form, number, entry, rows[entry["name"]], remove)
            if len(entries) < MOST:
                options = {name: row_title(name, row) for name, row in sorted(rows.items())}
                reasons = unfit("retain", form.draft, form.describe)
                made = kit.select("Add a method", options, None, add, name="add-retain", unfit=reasons)
                made.props('label="Add a method"')

    draw()


def build_method(form: Form, number: int, entry: dict[str, Any], row: dict[str, Any], remove: Any) -> None:
    name = entry["name"]
    with kit.tag(kit.box("tw-entry"), f"retain-method-{number}"):
        with kit.box("tw-entry-head"):
            kit.Text(row_title(name, row), "tw-strong tw-grow")
            kit.icon_button("close", f"Remove {name}", lambda: remove(entry), f"remove-retain-{number}")
        kit.Text(row_words(row), "tw-muted tw-small tw-line")
        needs = row["card"].get("rows")
        if needs in ROWS:
            build_data(form, retain_role(entry), Role(ROWS[needs], "Drop a file here, or choose one"))
        build_options(form, f"retain-{number}", name, row, f"{retain_role(entry)}.{name}")


# --- mixing ----------------------------------------------------------------------------------------------------------


def build_mix(form: Form) -> None:
    """Further training files, and the rule by which all of them share an epoch."""
    with kit.field("Further training files", "Mixed into each epoch; the model learns several tasks at once."):
        place = kit.tag(kit.box("tw-stack"), "mix")

    def mix() -> dict[str, Any]:
        return {"ids": [], "weights": {}, "temperature": "", **(form.draft.get("mix") or {})}

    def change(**values: Any) -> None:
        form.set("mix", {**mix(), **values})

    def add() -> None:
        change(ids=[*mix()["ids"], form.new_id()])
        draw()

    def remove(i: int) -> None:
        form.draft.pop(f"mix-{i}", None)
        change(ids=[k for k in mix()["ids"] if k != i], weights=_without(mix()["weights"], str(i)))
        draw()

    def weigh(key: str, text: str) -> None:
        change(weights={**mix()["weights"], key: text})

    def draw() -> None:
        place.clear()
        now = mix()
        with place:
            for number, i in enumerate(now["ids"], 1):
                with kit.box("tw-entry"):
                    with kit.box("tw-entry-head"):
                        kit.Text(f"File {number}", "tw-strong tw-grow")
                        label = f"Remove file {number}"
                        kit.icon_button("close", label, lambda k=i: remove(k), f"remove-mix-{number}")
                    build_data(form, f"mix-{i}", Role("Training data", "Drop a file here, or choose one"))
                    weight(f"Weight of file {number}", str(i), f"mix-weight-{number}")
            if now["ids"]:
                build_rule()
            if len(now["ids"]) < MOST:
                kit.button("Add a file", add, icon="add", kind="plain", name="add-mix")

    def weight(label: str, key: str, name: str) -> Element:
        with kit.field(label) as made:
            typed(label, mix()["weights"].get(key, ""), lambda v: weigh(key, v), name, "by its rows")
        return made

    def build_rule() -> None:
        with kit.box("tw-grid"):
            weight("Weight of the training data", "0", "mix-weight-0")
            help = "Instead of weights: 1 takes each row once, higher comes closer to equal parts"
            with kit.field("Temperature", help):
                typed("Temperature", mix()["temperature"], lambda v: change(temperature=v), "mix-temperature", "1")

    draw()


def _without(values: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k != key}

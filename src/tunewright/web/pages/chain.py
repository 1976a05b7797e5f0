"""Of a new job: further stages, each a job of its own that goes on from an earlier one's result."""

from __future__ import annotations

from typing import Any

from tunewright.web import kit
from tunewright.web.forms import BEFORE, FIRST, stage_names, stage_role
from tunewright.web.pages.data import TRAINING, build_data
from tunewright.web.pages.form import KIND_LABELS, Form, build_options, row_title, row_words, typed

MOST = 15  # further stages
LINES = {"n_epochs": "Epochs", "batch_size": "Batch size", "learning_rate": "Learning rate"}
AS_BEFORE = {"model": "The stage before", "tuner": "The same as where it goes on from"}
ONE = "one"
# what "Add a stage" offers -> (in words, objectives of the stages)
OFFERS: dict[str, tuple[str, tuple[str, ...]]] = {
    ONE: ("One more stage", ("sft",)),
    "rlhf": ("RLHF: a reward model from pairs, then PPO against it", ("reward", "ppo")),
    "rlaif": ("RLAIF: a judge labels pairs, DPO learns from them", ("rlaif",)),
}


def roles(draft: dict[str, Any]) -> dict[str, str]:
    """key of the draft -> what its file is, of every further stage."""
    names = stage_names(draft)
    return {stage_role(e): f"Training data of '{names[e['id']]}'" for e in draft.get("stages") or []}


def add_stages(form: Form, offer: str) -> None:
    """Put an offer's stages behind those of the draft. Of RLHF both go on from the first stage, as in the paper."""
    entries = list(form.draft.get("stages") or [])
    for objective in OFFERS[offer][1]:
        start = f"{BEFORE}{FIRST}" if offer == "rlhf" else ""
        entries.append({"id": form.new_id(), "objective": objective, "model": start})
    form.draft["stages"] = entries
    if offer == "rlhf":
        reward, ppo = entries[-2:]
        named = f"{BEFORE}{stage_names(form.draft)[reward['id']]}"
        form.texts(f"{stage_role(ppo)}.objective.ppo")["reward_model"] = named
    form.keep()


def build_stages(form: Form) -> None:
    """Any number of stages after the one above; each can be removed."""
    help = "What is above is the first stage. Each further one is a job of its own and leaves a model of its own."
    with kit.field("Further stages", help):
        place = kit.tag(kit.box("tw-stack"), "further-stages")

    def add(offer: str | None) -> None:
        if offer is not None:
            add_stages(form, offer)
            draw()

    def remove(entry: dict[str, Any]) -> None:
        form.draft.pop(stage_role(entry), None)
        for other in form.draft["stages"]:
            if other.get("model") == f"{BEFORE}{entry['id']}":
                other["model"] = ""
        form.set("stages", [e for e in form.draft["stages"] if e["id"] != entry["id"]])
        draw()

    def draw() -> None:
        known = form.describe["objective"]
        entries = form.draft["stages"] = [e for e in form.draft.get("stages") or [] if e["objective"] in known]
        place.clear()
        with place:
            for number, entry in enumerate(entries, 2):
                build_stage(form, number, entry, lambda e=entry: remove(e), draw)
            if len(entries) < MOST:
                options = {key: words for key, (words, _) in OFFERS.items()}
                made = kit.select("Add a stage", options, None, add, name="add-stage")
                made.props('label="Add a stage"')

    draw()


def build_stage(form: Form, number: int, entry: dict[str, Any], remove: Any, draw: Any) -> None:
    names, role, mark = stage_names(form.draft), stage_role(entry), f"stage-{number}"
    rows = {kind: form.describe[kind] for kind in ("objective", "tuner")}

    def choose(key: str, value: Any) -> None:
        entry[key] = value
        form.keep()
        draw()

    def write(key: str, value: str) -> None:
        entry[key] = value
        form.keep()

    with kit.tag(kit.box("tw-entry"), mark):
        with kit.box("tw-entry-head"):
            kit.Text(f"Stage {number}: {names[entry['id']]}", "tw-strong tw-grow")
            kit.icon_button("close", f"Remove stage {number}", remove, f"remove-{mark}")
        before = [i for i in names if i == FIRST or i < entry["id"]]
        starts = {f"{BEFORE}{i}": f"Stage {n}: {names[i]}" for n, i in enumerate(before, 1)}
        with kit.field("Goes on from"):
            options = {"": AS_BEFORE["model"], **starts, **{m: m for m in form.models}}
            kit.select(
                "Goes on from",
                options,
                entry.get("model") or "",
                lambda v: choose("model", v or ""),
                name=f"{mark}-model",
            )
        for kind, table in rows.items():
            with kit.field(KIND_LABELS[kind]):
                options = {name: row_title(name, row) for name, row in sorted(table.items())}
                options = {"": AS_BEFORE["tuner"], **options} if kind == "tuner" else options
                chosen = entry.get(kind) or ""
                kit.select(KIND_LABELS[kind], options, chosen, lambda v, k=kind: choose(k, v), name=f"{mark}-{kind}")
                if chosen in table:
                    kit.Text(row_words(table[chosen]), "tw-muted tw-small tw-line")
                    build_options(form, f"{mark}-{kind}", chosen, table[chosen], f"{role}.{kind}.{chosen}")
        build_data(form, role, TRAINING)
        with kit.box("tw-grid"):
            for key, label in LINES.items():
                with kit.field(label):
                    typed(label, entry.get(key) or "", lambda v, k=key: write(k, v), f"{mark}-{key}", "auto")

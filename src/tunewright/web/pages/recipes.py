"""Recipes: models without training. Made, listed, asked side by side with any other model, and deleted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

from tunewright.web import kit
from tunewright.web.client import ApiError
from tunewright.web.desk import Session
from tunewright.web.forms import DECODING, data_keys, recipe_request
from tunewright.web.pages.data import DOCUMENT, Role, build_data, file_problems
from tunewright.web.pages.form import Form, build_lines, build_part, open_form
from tunewright.web.series import ago, duration

ROWS = Role("Solved rows", "Drop a file of questions with their answers here, or choose one")
NAME = {"suffix": ("Suffix", "Part of the new model's name, up to 64 letters, digits and . _ -", "handbook")}
DEFAULTS = {
    "temperature": ("Temperature", "Of its answers, unless a request says otherwise", "the model's"),
    "max_tokens": ("Longest answer", "In tokens, unless a request says otherwise", "the model's"),
}
MODEL_HELP = {
    "proxy": "The large model, which stays as it is.",
    "mixture": "The model that writes the answer.",
}
MOST_DOCUMENTS = 50
ASK_TOKENS = 128  # of an answer in the comparison


def build(session: Session) -> None:
    with kit.box("tw-page tw-stack") as place:
        kit.heading("Recipes", 1)
        kit.Text(
            "Models without training: prompts, examples, documents, several models as one. Try these before you tune.",
            "tw-muted",
        )
        body = kit.box("tw-stack")

    async def fetch() -> tuple[Form, list[dict[str, Any]]]:
        form = await open_form(session, "recipe_draft", "fine-tune", "user_data")
        return form, await session.api.recipes()

    with place:
        kit.load(body, fetch, lambda found: build_all(*found))


def build_all(form: Form, made: list[dict[str, Any]]) -> None:
    with kit.card("Your recipes"):
        build_list(form, made)
    with kit.card("Compare"):
        build_compare(form)
    with kit.card("New recipe"):
        build_form(form)


# --- the list --------------------------------------------------------------------------------------------------------


def build_list(form: Form, made: list[dict[str, Any]]) -> None:
    if not made:
        kit.tag(kit.Text("No recipes yet. Make one below.", "tw-muted"), "no-recipes")
        return
    columns = ("Name", "Recipe", "Model below", "Made", "")
    rows = [
        (name_cell(r["id"]), title_of(form, r), r["model"], ago(r["created_at"]), actions_cell(form, r)) for r in made
    ]
    kit.table(columns, rows, "Recipes", "recipe-list")


def title_of(form: Form, made: dict[str, Any]) -> str:
    name = made["recipe"].get("name", "")
    return form.describe["recipe"].get(name, {}).get("card", {}).get("title", name)


def name_cell(name: str) -> Callable[[], Any]:
    return lambda: kit.copyable(name, "the model's name")


def actions_cell(form: Form, made: dict[str, Any]) -> Callable[[], Any]:
    async def delete() -> None:
        text = "Requests to it will fail, and so will recipes that stand on it. Its models stay."
        if await kit.confirm(f"Delete {made['id']}?", text, "Delete"):
            await form.session.api.delete_model(made["id"])
            kit.reopen("/recipes")

    def build_cell() -> None:
        with kit.box("tw-actions tw-actions-end"):
            target = f"/playground?model={quote(made['id'])}&base={quote(made['model'])}"
            kit.tag(kit.link("Playground", target, "tw-link"), "recipe-playground")
            kit.icon_button("delete", f"Delete {made['id']}", delete, "delete-recipe")

    return build_cell


# --- side by side ----------------------------------------------------------------------------------------------------


def build_compare(form: Form) -> None:
    """One question to any number of models; the answers stay after a reload."""
    store = form.session.store
    kept = dict(store.get("compared") or {})

    def keep(**values: Any) -> None:
        kept.update(values)
        store["compared"] = kept

    with kit.field("Models", "Recipes, base and tuned models."):
        options = {m: m for m in form.models}
        kit.select_many("Models", options, kept.get("models") or [], lambda v: keep(models=v), name="compare-models")
    with kit.field("Question"):
        asked = kit.text_area(
            "Question", kept.get("question") or "", lambda v: keep(question=v or ""), name="compare-question"
        )
    asking = kit.box("tw-actions")
    place = kit.box()

    async def ask() -> None:
        models, question = kept.get("models") or [], (asked.value or "").strip()
        place.clear()
        if not models or not question:
            with place:
                kit.error_box("Choose models, and write a question.", name="compare-error")
            return
        with place:
            kit.spinner(f"Asking {len(models)} model{'s' if len(models) > 1 else ''}…")
        answers = await asyncio.gather(*(answer_of(form.session, m, question) for m in models))
        keep(answers=list(answers))
        draw()

    def draw() -> None:
        place.clear()
        with place:
            if kept.get("answers"):
                build_answers(kept["answers"])

    with asking:
        kit.button("Ask all", ask, icon="send", kind="plain", name="compare-ask")
    draw()


async def answer_of(session: Session, model: str, question: str) -> dict[str, Any]:
    """{"model", "text", "usage", "seconds", "extra"}, or "error" instead."""
    messages = [{"role": "user", "content": question}]
    body = {"model": model, "messages": messages, "temperature": 0, "max_tokens": ASK_TOKENS}
    text, usage, extra, started = "", {}, {}, time.monotonic()
    try:
        async for piece in session.api.chat(body):
            text += piece.text
            usage, extra = piece.usage or usage, piece.extra or extra
    except ApiError as e:
        return {"model": model, "error": e.message}
    return {"model": model, "text": text, "usage": usage, "seconds": time.monotonic() - started, "extra": extra}


def build_answers(answers: list[dict[str, Any]]) -> None:
    columns = ("Model", "Answer", "Tokens in", "Out", "Time")
    kit.table(columns, [answer_row(a) for a in answers], "Answers side by side", "compare-answers")


def answer_row(answer: dict[str, Any]) -> tuple[Any, ...]:
    usage = answer.get("usage") or {}
    costs = (usage.get("prompt_tokens", "–"), usage.get("completion_tokens", "–"), duration(answer.get("seconds")))
    return (answer["model"], lambda: build_text(answer), *map(short_cell, costs))


def short_cell(value: Any) -> Callable[[], Any]:
    return lambda: kit.Text(value, "tw-nowrap")


def build_text(answer: dict[str, Any]) -> None:
    """The answer, and below it what it was made of."""
    if "error" in answer:
        kit.error_box(answer["error"])
        return
    kit.Text(answer["text"], "tw-prewrap tw-line")
    extra = answer.get("extra") or {}
    for number, text in enumerate(extra.get("contexts") or [], 1):
        kit.Text(f"Passage {number}: {text}", "tw-muted tw-small tw-prewrap tw-line")
    for proposal in extra.get("proposals") or []:
        kit.Text(f"{proposal['model']} proposed: {proposal['content']}", "tw-muted tw-small tw-prewrap tw-line")


# --- a new one -------------------------------------------------------------------------------------------------------


def build_form(form: Form) -> None:
    with kit.box("tw-form-inner"):
        build_part(form, "recipe", lambda name, row: build_needs(form, name, row))
        build_lines(form, {**NAME, **{key: DEFAULTS[key] for key in DECODING}})
    problems = kit.box()

    async def make() -> None:
        body, wrong = recipe_request(form.draft, form.describe)
        keys = data_keys(form.draft, form.describe["recipe"][form.part("recipe")]["card"]["data"])
        wrong += file_problems(form.draft, dict.fromkeys(keys, "Solved rows"))
        problems.clear()
        if not wrong:
            with problems:
                kit.spinner("Making the recipe…")
            try:
                await form.session.api.create_recipe(body)
            except ApiError as e:
                wrong = [e.message]
            else:
                form.session.store.pop("recipe_draft", None)
                kit.reopen("/recipes")
                return
        problems.clear()
        with problems:
            kit.error_box("\n".join(wrong), "The recipe was not made.", name="recipe-error")

    kit.button("Make recipe", make, icon="add", kind="primary", name="create-recipe")


def build_needs(form: Form, name: str, row: dict[str, Any]) -> None:
    """The model below, further models and files of a kind of recipe."""
    options = {m: m for m in form.models}
    with kit.field("Model below", MODEL_HELP.get(name, "The model that answers.")):
        kit.select(
            "Model below", options, form.draft["model"], lambda v: form.set("model", v), name="below", search=True
        )
    for option in row["card"]["models"]:
        build_model(form, name, option, row["schema"]["properties"][option], options)
    if row["card"]["data"] == "rows":
        build_data(form, "rows", ROWS)
    elif row["card"]["data"] == "documents":
        build_documents(form)


def build_model(form: Form, name: str, option: str, schema: dict[str, Any], options: dict[str, str]) -> None:
    """An option that holds the name of a model, or of several."""
    texts = form.texts(f"recipe.{name}")

    def keep(value: Any) -> None:
        texts[option] = value
        form.keep()

    with kit.field(option.capitalize(), schema.get("description", "")):
        if schema.get("type") == "array":
            kit.select_many(option, options, texts.get(option) or [], keep, name=f"recipe-{option}")
        else:
            kit.select(option, options, texts.get(option), keep, name=f"recipe-{option}", search=True)


def build_documents(form: Form) -> None:
    """Any number of documents."""
    place = kit.box("tw-stack")

    def add() -> None:
        form.set("documents", [*(form.draft.get("documents") or [0]), form.new_id()])
        draw()

    def draw() -> None:
        place.clear()
        keys = data_keys(form.draft, "documents")
        with place:
            for key in keys:
                build_data(form, key, DOCUMENT)
            if len(keys) < MOST_DOCUMENTS:
                kit.button("Add a document", add, icon="add", kind="plain", name="add-document")

    draw()

"""`tunewright recipe …`: models without training, and the table that says whether training is needed at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tunewright.core.recipe import RecipeSpec

HomeOption = Annotated[Path | None, typer.Option("--home", help="The data folder.", show_default="~/.tunewright")]
NAMES = "few_shot, mixture, prompt, proxy or retrieval"

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)


@app.callback()
def recipe() -> None:
    """Models without training, and whether tuning is needed.

    Prompts, examples, documents, several models as one; and a table of what they are worth beside a tuned model.
    docs/reference/recipes.md lists every recipe with its options.
    """


@app.command()
def create(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help=f"{NAMES}.", show_default=False)] = None,
    file: Annotated[Path | None, typer.Option(help="A spec in YAML, instead of NAME and options.")] = None,
    model: Annotated[
        str | None, typer.Option(help="The model below: a base, an `ft:` model or another recipe.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="few_shot: a file of chat rows. retrieval: documents, or folders of them.")
    ] = None,
    set: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="An option: k=8, alpha=0.7, by=similarity.")
    ] = None,
    suffix: Annotated[str | None, typer.Option(help="In the new model's name.")] = None,
    home: HomeOption = None,
) -> None:
    """Make a model of a recipe; print its name. It is served, compared and evaluated like any other.

    tunewright recipe create few_shot --model smollm2-135m-instruct --data train.jsonl --set k=8

    tunewright recipe create proxy --model large --set tuned=ft:small:… --set small=small
    """
    from tunewright.core.home import find_home
    from tunewright.core.run import read_artefact
    from tunewright.jobs.recipes import create_recipe, sources_of

    spec = read_recipe(name, file, model, data, set or [], suffix)
    root = file.parent if file is not None and not data else Path.cwd()
    folder = create_recipe(find_home(home).ensure(), spec, sources_of(spec.data, root))
    print(read_artefact(folder).name)


def read_recipe(
    name: str | None,
    file: Path | None,
    model: str | None,
    data: list[str] | None,
    overrides: list[str],
    suffix: str | None,
) -> RecipeSpec:
    """The spec of a YAML file, or of the options; options win. Raises SpecError."""
    from tunewright.cli.commands.train import override
    from tunewright.core.errors import SpecError
    from tunewright.core.recipe import parse_recipe_spec

    if (name is None) == (file is None):
        raise SpecError(f"Give the recipe's name ({NAMES}) or --file recipe.yaml, one of the two.")
    raw: Any = {"recipe": {"name": name}} if file is None else _read_yaml(file)
    if isinstance(raw, dict):
        given = {"model": model, "data": data, "suffix": suffix}
        raw = {**raw, **{key: value for key, value in given.items() if value}}
        for item in overrides:
            raw = override(raw, f"recipe.{item}")
    return parse_recipe_spec(raw)


def _read_yaml(path: Path) -> Any:
    import yaml

    from tunewright.core.errors import SpecError

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except OSError as e:
        raise SpecError(f"The recipe file '{path}' cannot be read: {e.strerror}.") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise SpecError(f"The recipe file '{path}' is not valid YAML: {' '.join(str(e).split())}.") from e


@app.command()
def compare(
    model: Annotated[str | None, typer.Option(help="The model to start from.", show_default="the demo's")] = None,
    tuned: Annotated[
        str | None, typer.Option(help="The `ft:` model to judge.", show_default="the newest demo's, with its data")
    ] = None,
    train: Annotated[
        Path | None, typer.Option(help="Rows that examples are taken from.", show_default="the demo's")
    ] = None,
    heldout: Annotated[
        Path | None, typer.Option(help="Rows that are answered and scored.", show_default="the demo's")
    ] = None,
    documents: Annotated[
        list[str] | None, typer.Option(help="What retrieval looks into.", show_default="the training rows")
    ] = None,
    instruction: Annotated[str | None, typer.Option(help="One sentence that tells an untuned model its task.")] = None,
    k: Annotated[int, typer.Option(min=1, max=64, help="Examples of few-shot.")] = 4,
    seeds: Annotated[int, typer.Option(min=1, max=20, help="Draws of the random examples.")] = 3,
    rows: Annotated[int | None, typer.Option(min=2, help="Held-out rows to use.", show_default="all")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")] = 64,
    encoder: Annotated[str, typer.Option(help="For similar examples and retrieval.")] = "all-minilm-l6-v2",
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write everything, answers too, to FILE.")
    ] = None,
    home: HomeOption = None,
) -> None:
    """Do I need to tune at all? One table: base, prompts, few-shot, retrieval and tuned model on held-out rows.

    Answers must be JSON objects with label fields, or labels. Nothing that is made for the table is kept.
    """
    from rich.console import Console

    from tunewright.cli import comparing
    from tunewright.core.home import find_home

    asked = comparing.Asked(
        model, tuned, train, heldout, documents or [], instruction, k, seeds, rows, max_tokens, encoder
    )
    comparing.run(find_home(home).ensure(), asked, Console(), json)

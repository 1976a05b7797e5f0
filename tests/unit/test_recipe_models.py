"""Making recipes: specs and their errors, what lies in the folder, names in lists, passages of documents."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import tiny
from recipe_kit import make, name_of
from tunewright.cli import main
from tunewright.core.durable import check_folder
from tunewright.core.errors import DataError, ModelNotFound, SpecError, UserError
from tunewright.core.home import Home
from tunewright.core.run import find_artefact, list_recipes, read_artefact
from tunewright.core.spec import Part
from tunewright.core.trace import Trace
from tunewright.engine.recipes import RECIPES
from tunewright.engine.recipes.base import Source, make_recipe
from tunewright.engine.recipes.passages import split
from tunewright.engine.recipes.texts import check_template, fill
from tunewright.jobs.prepare import find_origin
from tunewright.jobs.store import Store

RETRIEVAL = {"name": "retrieval", "encoder": "tiny"}
PROMPT = {"name": "prompt", "system": "Be brief."}


def wrong(recipe: Any) -> str:
    with pytest.raises(SpecError) as caught:
        make_recipe(Part.model_validate(recipe))
    return caught.value.message


def test_names_and_options_have_their_nearest_match() -> None:
    assert "Did you mean 'few_shot'?" in wrong("few_shots")
    assert "unknown field 'kk'. Did you mean 'k'?" in wrong({"name": "few_shot", "kk": 3})
    assert "'tuned' is missing" in wrong({"name": "proxy", "small": "s"})


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"name": "few_shot", "k": 0}, "k: Input should be greater than or equal to 1 (got 0)"),
        ({"name": "few_shot", "k": 65}, "less than or equal to 64 (got 65)"),
        ({"name": "few_shot", "by": "similar"}, "'random' or 'similarity'"),
        ({"name": "proxy", "tuned": "t", "small": "s", "alpha": 11}, "less than or equal to 10"),
        ({"name": "mixture", "proposers": []}, "proposers"),
        ({"name": "mixture", "proposers": ["a"], "layers": 5}, "less than or equal to 4"),
        ({"name": "retrieval", "passage_chars": 20}, "greater than or equal to 100"),
        ({"name": "retrieval", "template": "{passages}"}, "must have the place {input}"),
        ({"name": "retrieval", "template": "{pasages} {input}"}, "did you mean {passages}?"),
        ({"name": "prompt", "template": "no place"}, "must have the place {input}"),
        ({"name": "prompt"}, "it changes nothing"),
    ],
)
def test_values_out_of_range(recipe: dict[str, Any], said: str) -> None:
    assert said in wrong(recipe)


def test_every_recipe_says_what_it_is() -> None:
    from tunewright.cli.commands.recipe import NAMES

    assert re.split(", | or ", NAMES) == list(RECIPES.rows)
    for name in RECIPES:
        entry = RECIPES.load(name)
        assert entry.card.title and entry.card.does in ("rewrite", "combine", "mix") and entry.__doc__
        assert set(entry.card.models) <= set(entry.Options.model_fields)
        fields = entry.Options.model_fields.values()
        assert all(f.description for f in fields) and len(fields) <= 12


def test_a_template_is_filled_once_and_runs_no_code() -> None:
    template = '{"a": 1} {input} {{input}} {input.__class__} {0} {} %s'
    assert fill(template, {"input": "{input}{x}"}) == '{"a": 1} {input}{x} {{input}{x}} {input.__class__} {0} {} %s'
    assert check_template('{"json": {input}}', ("input",)) == '{"json": {input}}'


def test_passages_hold_everything_in_order_and_keep_their_size() -> None:
    text = (
        "# One\nfirst\n\nsecond " + "word " * 60 + "\n\n## Two\n\n" + "A sentence of it. " * 30 + "\n\nlast" + "x" * 300
    )
    for size in (100, 173, 400, 5000):
        found = split(text, size)
        assert all(0 < len(p) <= size for p in found)
        bodies = [p.split("\n", 1)[1] for p in found]
        words = "".join("".join(bodies).split())
        assert words == "".join("".join(text.replace("# One", "").replace("## Two", "").replace("#", "")).split())
        assert {p.split("\n", 1)[0] for p in found} == {"# One", "## Two"}
    assert split("  \n\n ", 100) == [] and split("a\n\nb", 100) == ["a\n\nb"]


def test_a_recipe_is_a_model_like_any_other(tiny_home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    """It is whole on disk, found by its name, listed, and can be deleted."""
    folder = make(tiny_home, PROMPT, "tiny", suffix="short", decoding={"temperature": 0.5})
    name = name_of(folder)
    assert name.startswith("ft:tiny:personal:short:") and folder == tiny_home.recipes / name.rsplit(":", 1)[-1]
    check_folder(folder)
    record = read_artefact(folder)
    assert (record.kind, record.base, record.decoding) == ("recipe", "tiny", {"temperature": 0.5})
    assert record.recipe == {"name": "prompt", "system": "Be brief.", "template": "{input}"}
    assert find_artefact(tiny_home, name) == folder
    second = name_of(make(tiny_home, PROMPT, name))
    assert second.startswith("ft:tiny:personal::")
    assert main.run(["models", "--home", str(tiny_home.root)]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [name, "recipe", "prompt over tiny"] in rows and [second, "recipe", f"prompt over {name}"] in rows
    store = Store.open(tiny_home)
    try:
        assert [m.name for m in store.list_models()] == [second, name]
        found = store.find_model(name)
        assert found is not None and found.folder == str(folder) and store.find_model(f"{name}x") is None
        assert store.delete_model(name) and not folder.exists() and not store.delete_model(name)
    finally:
        store.close()
    with pytest.raises(ModelNotFound):
        find_artefact(tiny_home, name)


@pytest.mark.parametrize(
    ("recipe", "model", "fields", "said"),
    [
        (PROMPT, "tinny", {}, "Did you mean 'tiny'?"),
        (PROMPT, "ft:tiny:personal::AbCdEfGh", {}, "does not exist"),
        ({"name": "mixture", "proposers": ["tiny", "tinny"]}, "tiny", {}, "Did you mean 'tiny'?"),
        (PROMPT, "tiny", {"data": ["rows.jsonl"]}, "takes no data"),
        ("few_shot", "tiny", {}, "needs 'data': one file of chat rows"),
        ("few_shot", "tiny", {"data": ["rows.jsonl", "rows.jsonl"]}, "takes one file; got 2"),
        ({"name": "few_shot", "k": 9}, "tiny", {"data": ["rows.jsonl"]}, "k is 9, but the data has 5 example(s)"),
        ("few_shot", "tiny", {"data": ["preference.jsonl"]}, "preference.jsonl line 1: an example is"),
        (RETRIEVAL, "tiny", {"data": ["rows.jsonl"]}, "'rows.jsonl' is no document; use files that end in .txt"),
        (RETRIEVAL, "tiny", {"data": ["nowhere"]}, "There is no file or folder 'nowhere'"),
        (RETRIEVAL, "tiny", {"data": ["empty"]}, "holds no files that end in"),
        (RETRIEVAL, "tiny", {"data": ["bytes.txt"]}, "'bytes.txt' is not UTF-8 (byte 1)"),
        ({"name": "few_shot", "by": "similarity", "encoder": "no", "k": 2}, "tiny", {"data": ["rows.jsonl"]}, "'no'"),
        (PROMPT, "tiny", {"decoding": {"temperatur": 0}}, "Did you mean 'temperature'?"),
        (PROMPT, "tiny", {"decoding": {"temperature": 3}}, "temperature"),
        (PROMPT, "tiny", {"suffix": "a b"}, "suffix"),
        (PROMPT, "tiny", {"sufix": "a"}, "unknown field 'sufix'. Did you mean 'suffix'?"),
    ],
)
def test_what_is_wrong_is_told_when_it_is_made(
    tiny_home: Home,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: Any,
    model: str,
    fields: dict[str, Any],
    said: str,
) -> None:
    """And then nothing was made."""
    monkeypatch.chdir(tmp_path)
    tiny.write_rows(tmp_path / "rows.jsonl", tiny.sft_rows(5))
    answers = {w: [{"role": "assistant", "content": w}] for w in ("preferred_output", "non_preferred_output")}
    pair = {"input": {"messages": [{"role": "user", "content": "q"}]}, **answers}
    tiny.write_rows(tmp_path / "preference.jsonl", [pair])
    (tmp_path / "empty").mkdir()
    (tmp_path / "bytes.txt").write_bytes(b"a\xff")
    with pytest.raises(UserError) as caught:
        make(tiny_home, recipe, model, **fields)
    assert said in caught.value.message
    assert list_recipes(tiny_home) == [] and list(tiny_home.recipes.iterdir()) == []


def test_paths_are_no_model_names_over_http(tiny_home: Home) -> None:
    from tunewright.core.recipe import parse_recipe_spec
    from tunewright.jobs.recipes import create_recipe

    place = str(tiny_home.models / "tiny")
    for recipe, model in ((PROMPT, place), ({"name": "mixture", "proposers": [place]}, "tiny")):
        spec = parse_recipe_spec({"recipe": recipe, "model": model})
        with pytest.raises(ModelNotFound, match="is a path; give the name of a model instead"):
            create_recipe(tiny_home, spec, allow_paths=False)
        assert read_artefact(create_recipe(tiny_home, spec)).kind == "recipe"


def test_recipes_may_not_be_a_tower(tiny_home: Home) -> None:
    name = "tiny"
    for _ in range(4):
        name = name_of(make(tiny_home, PROMPT, name))
    with pytest.raises(SpecError, match="At most 4 recipes may stand upon each other"):
        make(tiny_home, PROMPT, name)


def test_a_recipe_is_not_trained(tiny_home: Home) -> None:
    name = name_of(make(tiny_home, PROMPT, "tiny"))
    with pytest.raises(SpecError, match=r"is a recipe: it has no weights .* Train the model below it, 'tiny'"):
        find_origin(name, tiny_home)


def test_labelled_rows_are_examples_too(tiny_home: Home, tmp_path: Path) -> None:
    data = tiny.write_rows(tmp_path / "labels.jsonl", tiny.label_rows(6))
    folder = make(tiny_home, {"name": "few_shot", "k": 2}, "tiny", [data])
    row = json.loads((folder / "rows.jsonl").read_text().splitlines()[4])
    assert row["messages"][0]["content"].endswith("\nIs it so?")
    assert row["messages"][1] == {"role": "assistant", "content": "green"}


def test_the_command_reads_options_or_a_file(
    tiny_home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.write_rows(tmp_path / "rows.jsonl", tiny.sft_rows(5))
    home = ["--home", str(tiny_home.root)]
    options = ["--model", "tiny", "--data", str(tmp_path / "rows.jsonl"), "--set", "k=2", "--suffix", "s"]
    assert main.run(["recipe", "create", "few_shot", *options, *home]) == 0
    (tmp_path / "r.yaml").write_text("recipe: {name: few_shot, k: 3}\nmodel: tiny\ndata: rows.jsonl\n")
    assert main.run(["recipe", "create", "--file", str(tmp_path / "r.yaml"), "--set", "k=2", *home]) == 0
    names = capsys.readouterr().out.split()
    one, other = (read_artefact(find_artefact(tiny_home, n)) for n in names)
    assert one.recipe == other.recipe and one.recipe is not None and one.recipe["k"] == 2
    assert main.run(["recipe", "create", *home]) != 0
    assert "Give the recipe's name" in capsys.readouterr().err
    assert main.run(["recipe", "create", "few_sho", "--model", "tiny", *home]) != 0
    assert "Did you mean 'few_shot'?" in capsys.readouterr().err


def test_passages_are_contexts_of_a_trace() -> None:
    message = {"role": "assistant", "content": "a"}
    trace = Trace.model_validate(
        {
            "id": "t",
            "created_at": 1.0,
            "model": "m",
            "messages": [{"role": "user", "content": "q"}],
            "completion": message,
            "finish_reason": "stop",
            "input_tokens": 1,
            "output_tokens": 1,
            "duration_s": 0.1,
            "contexts": ["p"],
        }
    )
    assert trace.to_conversation().contexts == ["p"]


def test_a_document_s_name_counts_not_its_path(tmp_path: Path) -> None:
    """Uploaded files lie under other names."""
    from tunewright.engine.recipes.passages import make_passages

    (tmp_path / "0").write_text("Some text.")
    assert list(make_passages([Source("a.md", tmp_path / "0")], 100)) == [{"key": "Some text.", "source": "a.md"}]
    with pytest.raises(SpecError):
        list(make_passages([Source("a.pdf", tmp_path / "0")], 100))


@pytest.mark.slow
def test_no_torch_for_making_a_recipe() -> None:
    import subprocess
    import sys

    code = (
        "import sys; import tunewright.jobs.recipes, tunewright.cli.comparing, tunewright.engine.recipes as r; "
        "[r.RECIPES.load(n) for n in r.RECIPES.rows]; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_damaged_rows_are_not_examples(tiny_home: Home, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"messages": [{"role": "usr", "content": "q"}]}\n')
    with pytest.raises(DataError):
        make(tiny_home, "few_shot", "tiny", [tmp_path / "rows.jsonl"])

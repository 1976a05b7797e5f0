"""Writes the pages of docs/reference that the code knows best: job-spec.md, data-formats.md, recipes.md."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from tunewright.core.allowed import in_words
from tunewright.core.spec import KINDS, LISTS, TASKS, JobSpec
from tunewright.data.formats import FORMATS
from tunewright.engine.recipes import RECIPES

FOLDER = Path(__file__).parent.parent / "docs" / "reference"
RECIPES_PAGE = FOLDER / "recipes.md"
HEAD = """# Job spec

<!-- Made by `make docs` from src/tunewright/core/spec.py and the tables. Do not edit. -->

The same fields in a YAML file (`tunewright train job.yaml`), in the `tunewright` object of an HTTP request, and in the
dashboard's form. An unknown field is an error that names the nearest one. The smallest spec:

```yaml
model: smollm2-135m-instruct
training_file: train.jsonl
```

A part (tuner, objective, optimizer, schedule) is written as its name, `tuner: lora`, or with options,
`tuner: {name: lora, r: 32}`. On the command line: `--set tuner.r=32`. `retain` is a list of parts, see
[against forgetting](retain.md). With `stages`, the specs of several jobs become one: see [chains](../how-to/chains.md).
"""
FORMATS_HEAD = """# Data formats

<!-- Made by `make docs` from src/tunewright/data/formats. Do not edit. -->

Files may be JSON Lines, a JSON array, CSV, Parquet or plain text lines, in UTF-8 or UTF-16. The format of the rows is
found from the first 100 of them; `tunewright data check FILE` says which one it is and why, and lists the problems with
line and field. `format:` in a job spec sets it by hand. A `prompt` or `completion` may be a text or a list of chat
messages; only the completion is trained.

Which objective uses which rows: [Objectives](../objectives.md). A label is a class's name, a list of classes
(`head: multilabel`; an empty list: none applies) or a number. A preference row may have a `margin`, by which its better
answer is to win (`head: reward`). Jobs over rewards (`grpo`, `rloo`, `ppo`) read their prompts as `reinforcement`:
fields beside the messages are for the grader, and an assistant message at the end is no part of the prompt.

An encoder-decoder (T5, mT5) reads what comes before an answer and learns the answer: of chat rows every trained turn is
a target, and its source is what the model's chat template writes of the messages before, or, without a template, their
contents one below the other.
"""
RECIPES_MARK = "<!-- The options below are made by `make docs` from src/tunewright/engine/recipes. Do not edit. -->"


def meanings(doc: str) -> dict[str, str]:
    """field -> what the docstring says of it. Entries look like `name: text` or `name, name: text`."""
    text = " ".join(doc.split("\n\n", 1)[1].split())
    names = "|".join(JobSpec.model_fields)
    starts = list(re.finditer(rf"(?:^|(?<=[.;] ))((?:{names})(?:, (?:{names}))*): ", text))
    found: dict[str, str] = {}
    for here, after in zip(starts, [*starts[1:], None], strict=True):
        said = text[here.end() : after.start() if after else len(text)].strip(" ;")
        found.update(dict.fromkeys(here[1].split(", "), said))
    return found


def spec_rows() -> list[str]:
    """One table row a field, in the order of the model."""
    schema = JobSpec.model_json_schema()["properties"]
    said = meanings(JobSpec.__doc__ or "")
    rows = ["| field | allowed | default | meaning |", "|---|---|---|---|"]
    for name, field in JobSpec.model_fields.items():
        default = "required" if field.is_required() else f"`{plain(field.get_default(call_default_factory=True))}`"
        rows.append(f"| `{name}` | {in_words(schema[name])} | {default} | {said.get(name, '')} |")
    return rows


def plain(value: Any) -> str:
    name = getattr(value, "name", None)
    return str(name) if name else json.dumps(value, ensure_ascii=False)


def task_rows() -> list[str]:
    rows = ["| task | metric | decoding |", "|---|---|---|"]
    return rows + [
        f"| `{name}` | {t.metric} | {', '.join(f'{k} {v:g}' for k, v in t.decoding.items()) or 'default'} |"
        for name, t in TASKS.items()
    ]


def part_rows(kind: str, table: dict[str, Any]) -> list[str]:
    """A section for each row of a table: its first line, and its options."""
    lines = [f"## {kind.capitalize()}", ""]
    for name, row in table.items():
        title = row["card"].get("title", "")
        lines += [f"**`{name}`**: {title + '. ' if title else ''}{row.get('doc', '')}", ""]
        options = row["schema"].get("properties", {})
        if options:
            lines += ["| option | allowed | default | meaning |", "|---|---|---|---|"]
            for option, schema in options.items():
                default = json.dumps(row["defaults"].get(option), ensure_ascii=False)
                lines.append(f"| `{option}` | {in_words(schema)} | `{default}` | {schema.get('description', '')} |")
            lines.append("")
    return lines


def page(describe: dict[str, Any]) -> str:
    """The whole page. describe: what `python -m tunewright.train.describe` prints."""
    lines = [HEAD, "## Fields", "", *spec_rows(), "", "## Tasks", "", *task_rows(), ""]
    for kind in (*KINDS, *LISTS):
        lines += part_rows(kind, describe[kind])
    return "\n".join(lines).rstrip() + "\n"


def read_describe() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "tunewright.train.describe"], capture_output=True, check=True)
    return json.loads(done.stdout)


def formats_page() -> str:
    """One section a data format, with its smallest row."""
    lines = [FORMATS_HEAD]
    for name in FORMATS.rows:
        found = FORMATS.load(name)
        how = "Never recognised, only taken where the job says so; it needs" if found.asked else "Recognised by"
        lines += [f"## `{name}`: {found.title}", "", f"{how} {found.wants}.", ""]
        lines += ["```json", found.example, "```", ""]
    return "\n".join(lines).rstrip() + "\n"


def recipes_page() -> str:
    """The written part of the page, down to the mark, then the options of each recipe."""
    written, _, _ = RECIPES_PAGE.read_text(encoding="utf-8").partition(RECIPES_MARK)
    lines = [f"{written.rstrip()}\n\n{RECIPES_MARK}", ""]
    for name in RECIPES.rows:
        entry = RECIPES.load(name)
        said = (entry.__doc__ or "").strip().split("\n")[0]
        lines += [f"## `{name}`: {entry.card.title}", "", said, ""]
        lines += ["| option | allowed | default | meaning |", "|---|---|---|---|"]
        fields = entry.Options.model_fields
        for option, schema in entry.Options.model_json_schema()["properties"].items():
            default = "required" if fields[option].is_required() else f"`{json.dumps(schema.get('default'))}`"
            lines.append(f"| `{option}` | {in_words(schema)} | {default} | {schema.get('description', '')} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def main(args: list[str], describe: dict[str, Any] | None = None) -> int:
    """Write the pages; with --check only compare. Returns the exit code."""
    pages = {
        "job-spec.md": page(describe or read_describe()),
        "data-formats.md": formats_page(),
        "recipes.md": recipes_page(),
    }
    stale = [n for n, text in pages.items() if not (p := FOLDER / n).exists() or p.read_text(encoding="utf-8") != text]
    if "--check" not in args:
        for name, text in pages.items():
            (FOLDER / name).write_text(text, encoding="utf-8")
        return 0
    if stale:
        print(f"not up to date: {', '.join(stale)}; run `make docs`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

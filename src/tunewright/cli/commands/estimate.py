"""`tunewright estimate`: what a model of any size needs to be trained, and what of it fits, without its weights."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from tunewright.core.home import Home
    from tunewright.models.memory import Setting

COMMAND = (sys.executable, "-m", "tunewright.models.shape")
COLUMNS = ("weights", "gradients", "optimizer", "activations", "head")


def estimate(
    model: Annotated[str, typer.Option(help="A model's name, a folder, or a config.json.")],
    tuner: Annotated[str, typer.Option(help="full, lora or qlora; smaller ones are shown too.")] = "full",
    length: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Rows computed at once.")] = 1,
    device: Annotated[str, typer.Option(help="Memory of the GPU, e.g. 24GB; `cpu 32GB` trains on the CPU.")] = "24GB",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    rank: Annotated[int, typer.Option(min=1, help="Rank of LoRA.")] = 16,
    optimizer: Annotated[str, typer.Option(help="adamw, adamw8bit, adafactor, lion, muon or sgd.")] = "adamw",
    objective: Annotated[str, typer.Option(help="Such as dpo: a pair is two rows, with a reference.")] = "sft",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    home: Annotated[Path | None, typer.Option(help="The data folder.", show_default="~/.tunewright")] = None,
) -> None:
    """Say what training a model needs, and what fits.

    Everything is counted from the model's config on meta tensors; nothing is downloaded or loaded.
    """
    from rich.console import Console

    from tunewright.core.home import find_home
    from tunewright.models import memory

    gpu, there = read_device(device)
    for name, value, allowed in (
        ("--tuner", tuner, ("full", "lora", "qlora")),
        ("--dtype", dtype, tuple(memory.BYTES)),
        ("--optimizer", optimizer, tuple(memory.OPTIMIZER_BYTES)),
    ):
        check_word(name, value, allowed)
    place = find_home(home)
    together, reference = (1, False) if objective == "sft" else read_objective(objective, place)
    setting = memory.Setting(
        tuner, dtype, "none", optimizer, False, rank, batch * length * together, length, together, reference
    )
    config = find_config(model, place)
    found = answer(read_shape(config), setting, there, gpu)
    if as_json:
        print(json.dumps({"model": model, "device_bytes": there, "device": "gpu" if gpu else "cpu", **found}, indent=2))
        return
    show(model, found, there, gpu, Console())


def read_objective(name: str, home: Home) -> tuple[int, bool]:
    """(rows of a group, whether the objective compares with the model at step 0). Raises SpecError."""
    from tunewright.jobs.describe import load_describe

    known = load_describe(home)["objective"]
    check_word("--objective", name, tuple(sorted(known)))
    card = known[name]["card"]
    return card["group_size"] or 1, card["needs_reference"]


def check_word(option: str, value: str, allowed: tuple[str, ...]) -> None:
    from tunewright.core.errors import SpecError, did_you_mean

    if value not in allowed:
        more = " Every other tuner is measured by its job's preflight, before step 1." if option == "--tuner" else ""
        near = did_you_mean(value, allowed)
        raise SpecError(f"{option} is '{value}'; use one of: {', '.join(allowed)}.{near}{more}")


def read_device(text: str) -> tuple[bool, int]:
    """(whether it is a GPU, its bytes) of `24GB`, `gpu 24GB` or `cpu 32GB`. Raises SpecError."""
    from tunewright.core.errors import SpecError
    from tunewright.core.spec import parse_bytes

    found = re.fullmatch(r"\s*(?:(cpu|gpu)[ :]+)?(.*)", text, re.IGNORECASE)
    try:
        return (found is None or (found[1] or "gpu").lower() == "gpu"), parse_bytes(found[2] if found else text)
    except ValueError as e:
        raise SpecError(f"--device: {e}; or with what it is: `cpu 32GB`, `gpu 24GB`.") from e


def find_config(model: str, home: Home) -> dict[str, Any]:
    """The object of a model's config.json: of a file, a folder, a well-known name or a model in the data folder."""
    from tunewright.core.errors import ModelNotFound, UserError, did_you_mean
    from tunewright.models.catalogue import list_models
    from tunewright.models.known import ALIASES, KNOWN

    path = Path(model).expanduser()
    stored = {m.name: m.folder for m in list_models(home, downloadable=False) if m.folder is not None}
    path = stored.get(model) or path
    path = path / "config.json" if path.is_dir() else path
    if path.is_file():
        try:
            return json.loads(path.read_bytes())
        except ValueError as e:
            raise UserError(f"'{path}' is not JSON: {e}.", param="model") from e
    known = KNOWN.get(ALIASES.get(model.lower(), model.lower()))
    if known is None:
        names = [*KNOWN, *ALIASES, *stored]
        raise ModelNotFound(
            f"There is no model and no config.json '{model}'.{did_you_mean(model, names)} Known here: "
            f"{', '.join(sorted({*KNOWN, *stored}))}. For any other model give the path of its config.json.",
            param="model",
        )
    return known


def read_shape(config: dict[str, Any]) -> dict[str, Any]:
    """models.shape of a config, from a process that may import torch. Raises UserError for a model it cannot build."""
    from tunewright.core.errors import UserError

    if "model_type" not in config:
        raise UserError("The config has no 'model_type', so it is not the config.json of a model.", param="model")
    done = subprocess.run(COMMAND, input=json.dumps(config), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise UserError(f"A model of type '{config['model_type']}' cannot be counted: {last[:300]}", param="model")
    return json.loads(done.stdout)


def answer(shape: dict[str, Any], setting: Setting, there: int, gpu: bool) -> dict[str, Any]:
    """{"parameters", "rows": the table, "best": the title of the first that fits and is built in, or None, "longest":
    rows that fit with it, "other": the first that fits and is not built in, "least", "least_bytes": the smallest}."""
    from tunewright.models import memory

    rows = memory.table(shape, setting, there, gpu)
    best = next((r for r in rows if r["fits"] and r["here"]), None)
    least = min(rows, key=lambda r: r["bytes"]["device"])
    chosen = memory.Setting(**{k: (best or least)[k] for k in memory.Setting.__dataclass_fields__})
    return {
        "parameters": shape["parameters"],
        "rows": rows,
        "best": best and best["title"],
        "other": next((r["title"] for r in rows if r["fits"] and not r["here"]), None),
        "longest": memory.longest(shape, chosen, there, gpu),
        "least_bytes": least["bytes"]["device"],
        "least": least["title"],
    }


def show(model: str, found: dict[str, Any], there: int, gpu: bool, console: Console) -> None:
    """The table, and what follows from it in one sentence."""
    from rich.box import SIMPLE
    from rich.table import Table

    place = "GPU" if gpu else "CPU"
    header = ["method", *COLUMNS, place, *(["CPU"] if gpu else []), f"fits in {_gb(there)}"]
    lines = [_line(row, gpu) for row in found["rows"]]
    console.print(f"{model}: {found['parameters']:,} parameters. Memory in GB:", highlight=False)
    if console.is_terminal:
        table = Table(*header, box=SIMPLE)
        for line in lines:
            table.add_row(*line, style="dim" if line[-1] == "no" else None)
        console.print(table)
    else:
        print("\n".join("\t".join(line) for line in [header, *lines]))
    console.print(verdict(found), highlight=False, soft_wrap=True)
    if any(r["fits"] and not r["here"] for r in found["rows"]):
        console.print("* not built into tunewright so far", style="dim", highlight=False)


def verdict(found: dict[str, Any]) -> str:
    if found["best"] is None and found["other"] is not None:
        return f"Nothing that tunewright can train so far fits; in other programs {found['other']} would."
    if found["best"] is None:
        return (
            f"Nothing fits: the smallest setting ({found['least']}) needs {_gb(found['least_bytes'])}. Take a shorter "
            "length, a smaller rank or model, or a larger device."
        )
    return f"Fits: {found['best']}; rows of up to {found['longest']:,} tokens would fit with it."


def _line(row: dict[str, Any], gpu: bool) -> list[str]:
    b = row["bytes"]
    b = {**b, "weights": b["weights"] + b["trainable"]}
    figures = [*(b[c] for c in COLUMNS), b["device"], *([b["cpu"]] if gpu else [])]
    return [row["title"], *(f"{x / 1e9:.2f}" for x in figures), _fits(row)]


def _fits(row: dict[str, Any]) -> str:
    """`yes*` is a setting that would fit, but that is not built in."""
    return ("yes" if row["here"] else "yes*") if row["fits"] else "no"


def _gb(n: float) -> str:
    return f"{n / 1e9:.3g} GB"

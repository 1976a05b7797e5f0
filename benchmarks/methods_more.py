"""The tables of docs/methods.md beside that of the methods: against forgetting, without tuning, proxy-tuning."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from tunewright.evals.compare import Line, Measured, Variant, conclusion, lines, verdicts
from tunewright.evals.task import VALID, Scorecard
from tunewright.metrics.accuracy import share
from tunewright.metrics.intervals import Interval, paired_bootstrap

Runs = Sequence[Mapping[str, Any]]
PLAIN, LEAST = "plain", 0.5  # of plain training's gain: who learns less holds the old by not learning


def more(results: Path) -> Iterator[str]:
    """Of what has results."""
    for folder in folders(results / "retain"):
        yield forgetting([json.loads(p.read_text()) for p in sorted(folder.glob("*.json"))])
    if files := sorted((results / "untuned").glob("*.json")):
        yield untuned({p.stem: json.loads(p.read_text()) for p in files})
    if (results / "proxy.json").is_file():
        yield proxy(json.loads((results / "proxy.json").read_text()))


def folders(place: Path) -> list[Path]:
    return sorted(p for p in place.iterdir() if p.is_dir()) if place.is_dir() else []


# --- against forgetting -----------------------------------------------------------------------------------------------

FORGETTING = """## Against forgetting: {old[name]}

The old task: {old[source]} (hash `{old[sha256]}`), {n} rows judged. The new one: {data[source]}. {model}, the tuner
`{settings[tuner]}`, {settings[n_epochs]} epoch of batches of {settings[batch_size]}: the same rows, steps and rate for
all, the [methods](reference/retain.md) at their defaults. **Retained**: other rows of the old task that the job has
(`kl_alone`: none, it compares on the training rows). **Lost**: loss on the old task after minus before (nats a token).
**Less than plain**: what plain training lost more. **Gain**: the loss on held-out rows of the new task, before minus
after. Averaged over seeds, with paired 95 % intervals over rows. **Holds**: the interval of "less than plain" is above
0, and at least {least:.0%} of plain's gain is there.

| method | seeds | options | retained | lost (95 %) | less than plain (95 %) | gain (95 %) | of plain's | holds |
|---|---|---|---|---|---|---|---|---|
"""


def forgetting(runs: Runs) -> str:
    """The section of one old task."""
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for run in runs:
        by_method.setdefault(run["method"], []).append(run)
    one = runs[0]
    names = {"old": one["old_task"], "n": len(one["old"]), "least": LEAST}
    top = FORGETTING.format(**names, data=one["data"], model=one["model"], settings=one["settings"])
    plain = by_method.get(PLAIN, [])
    order = sorted(by_method, key=lambda name: (name != PLAIN, name))
    return top + "\n".join(_held(name, by_method[name], plain) for name in order) + "\n"


def _held(name: str, runs: Runs, plain: Runs) -> str:
    """A line of the table. Compared are seeds that both have."""
    lost, gain = change(runs, "old"), change(runs, "held_out", sign=-1)
    options = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in runs[0]["options"].items())
    cells = [f"`{name}`", str(len(runs)), options, str(runs[0]["retained"] or ""), _signed(lost)]
    seeds = {r["seed"] for r in runs} & {r["seed"] for r in plain}
    if name == PLAIN or not seeds:
        return f"| {' | '.join([*cells, '', _signed(gain), '', ''])} |"
    ours, theirs = ([r for r in side if r["seed"] in seeds] for side in (runs, plain))
    less = paired_bootstrap(_rows(theirs, "old"), _rows(ours, "old"))
    of_plain = change(ours, "held_out").value / change(theirs, "held_out").value
    holds = "yes" if less.low > 0 and of_plain >= LEAST else "no"
    return f"| {' | '.join([*cells, _signed(less), _signed(gain), f'{of_plain:.0%}', holds])} |"


def _rows(runs: Runs, kind: str) -> list[float]:
    """[rows] loss, averaged over seeds."""
    return [fmean(values) for values in zip(*(r[kind] for r in runs), strict=True)]


def change(runs: Runs, kind: str, sign: int = 1) -> Interval:
    """Loss after minus before, rows averaged over seeds first; sign -1: before minus after."""
    before, after = _rows([r["base"] for r in runs], kind), _rows(runs, kind)
    return paired_bootstrap(after, before) if sign > 0 else paired_bootstrap(before, after)


def _signed(found: Interval) -> str:
    return f"{found.value:+.3f} ({found.low:+.3f} to {found.high:+.3f})"


# --- without tuning ---------------------------------------------------------------------------------------------------

UNTUNED = """## Do I need to tune at all?

{model} on the demo's {n_rows} held-out messages, as `tunewright recipe compare` asks and scores them. Shares of right
answers with 95 % intervals over rows; of several prompts or draws the mean, and in brackets the worst and the best.
**Tokens**: read and written an answer. **s/answer**: time of the machine, {together} answers computed at once on
{threads} threads of {machine[cpu]}; who asks alone waits longer. {once} It is one training: what another seed gives is
in the table of the methods.

"""


def untuned(files: Mapping[str, Mapping[str, Any]]) -> str:
    """The section. files: one for each variant, and the baselines."""
    variants = [f for f in files.values() if "system" in f]
    if not variants:
        return ""
    found = lines([_measured(f) for f in sorted(variants, key=_order)])
    trained = next((f["training_seconds"] for f in variants if "training_seconds" in f), None)
    once = f"Training took {trained:.0f} s, once." if trained is not None else "The tuned model is not measured."
    measures = [VALID, *(m for m in found[0].shares if m != VALID)]
    head = ["system", *(m.replace("_", " ") for m in measures), "tokens in", "out", "s/answer"]
    rows = [[_name(x), *(_share(x.shares[m], x.spread[m], x.n_variants) for m in measures),
             f"{x.prompt_tokens:.0f}", f"{x.completion_tokens:.0f}", f"{x.seconds:.2f}"] for x in found]  # fmt: skip
    simple = [Scorecard(*item) for item in files.get("baselines", {}).get("cards", {}).items()]
    rows += [[c.name, *("" if (i := c.share(m)) is None else _share(i) for m in measures), "", "", ""] for c in simple]
    table = "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))
    return UNTUNED.format(**variants[0], once=once) + table + "\n\n" + _verdict(variants, simple)


SYSTEMS = ("base", "prompt", "few-shot, random", "few-shot, similar", "retrieval", "tuned")


def _order(file: Mapping[str, Any]) -> tuple[int, str]:
    return SYSTEMS.index(file["system"]), file["name"]


def _measured(file: Mapping[str, Any]) -> Measured:
    card = Scorecard(_full(file), file["outcomes"])
    variant = Variant(file["system"], file["name"])
    cost = {k: file[k] for k in ("prompt_tokens", "completion_tokens", "seconds")}
    return Measured(variant, card, file["answers"], **cost)


def _full(file: Mapping[str, Any]) -> str:
    return f"{file['system']}, {file['name']}" if file["name"] else file["system"]


def _name(line: Line) -> str:
    return line.system if line.n_variants == 1 else f"{line.system} (x{line.n_variants})"


def _share(found: Interval, spread: tuple[float, float] = (0.0, 0.0), n: int = 1) -> str:
    several = f" [{spread[0]:.0%} to {spread[1]:.0%}]" if n > 1 else ""
    return f"{found.value:.0%} ({found.low:.0%} to {found.high:.0%}){several}"


def _verdict(variants: Runs, simple: Sequence[Scorecard]) -> str:
    """The tuned model against the best of all others, each prompt and draw by itself."""
    cards = {f["system"]: Scorecard(_full(f), f["outcomes"]) for f in variants if f["system"] == "tuned"}
    if not cards:
        return ""
    tuned = cards["tuned"]
    others = [Scorecard(_full(f), f["outcomes"]) for f in variants if f["system"] != "tuned"]
    found = verdicts(tuned, [*others, *simple], {m: () for m in tuned.outcomes if m != VALID})
    return "\n".join([*(f"- {verdict}" for verdict in found), "", conclusion(found), ""])


# --- proxy-tuning -----------------------------------------------------------------------------------------------------

PROXY = """## Proxy-tuning: a large model moved by a small tuned one

The [recipe `proxy`](reference/recipes.md): {model} is the large model and stays as it is; the small one is its first
{layers} layers, distilled from it (what the large one would say after every token of other chats and of the demo's
rows), then tuned on the demo's rows. {rows} held-out messages. **Loss**: of the right answers (nats a token), lower is
closer to the task. **Against large**: difference to the large model alone, paired 95 % interval over rows.

| system | loss | against large (95 %) | valid JSON | department | right departments against large (95 %) |
|---|---|---|---|---|---|
"""


def proxy(result: Mapping[str, Any]) -> str:
    """The section."""
    systems = result["systems"]
    rows = [_moved(name, found, systems["large"]) for name, found in systems.items()]
    moved = [name for name in systems if name.startswith("proxy") and is_moved(systems[name], systems["large"])]
    verdict = f"Surely closer to the task than the large model alone: {', '.join(moved) or 'none'}."
    return "\n".join([PROXY.format(**result).rstrip(), *rows, "", verdict, ""])


def is_moved(found: Mapping[str, Any], large: Mapping[str, Any]) -> bool:
    """Whether the loss of the right answers falls and more of them are given, both beyond their intervals."""
    closer = paired_bootstrap(found["losses"], large["losses"])
    return closer.high < 0 < paired_bootstrap(found["department"], large["department"]).low


def _moved(name: str, found: Mapping[str, Any], large: Mapping[str, Any]) -> str:
    cells = [name, f"{fmean(found['losses']):.3f}", "", *(_share(share(found[m])) for m in (VALID, "department")), ""]
    if found is not large:
        cells[2] = _signed(paired_bootstrap(found["losses"], large["losses"]))
        cells[5] = _points(paired_bootstrap(found["department"], large["department"]))
    return f"| {' | '.join(cells)} |"


def _points(found: Interval) -> str:
    return f"{100 * found.value:+.0f} ({100 * found.low:+.0f} to {100 * found.high:+.0f}) points"

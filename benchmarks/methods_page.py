"""docs/methods.md from the JSON files of benchmarks.methods: tables, who is weak, and how to choose."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.methods_more import change, folders, more
from tunewright.metrics.accuracy import share
from tunewright.metrics.intervals import Interval
from tunewright.tuners import TUNERS

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
RESULTS = Path(__file__).parent / "results"
REFERENCE = "lora"
# of LoRA's gain; methods that train next to nothing are asked for less
ENOUGH, ENOUGH_OF_TINY = 0.5, 0.25
TINY = {"prompt", "prefix", "p_tuning", "bitfit", "ia3"}
Runs = Sequence[Mapping[str, Any]]

TOP = """# Methods, measured

Written by `make methods-table` from real runs; do not edit. The raw results are in `benchmarks/results/`.

## Which one?

`lora`, unless a line below says otherwise: best known, on the fast path, served in one batch with others, mergeable.

| your rows | take | because |
|---|---|---|
| none | a prompt, `retrieval`, `proxy` with a small model ([recipes](reference/recipes.md)) | nothing is trained |
| a handful | `few_shot`; then [measure](#do-i-need-to-tune-at-all) whether tuning pays | they fit into the prompt |
| fewer than about 100 | `lora` with a small `r`, or `ia3` | fewer trained numbers overfit later |
| hundreds to thousands | `lora`; `dylora` if the rank is open | one training of `dylora` serves every rank up to `r` |
| many thousands, far from what the model knows | `full`; `half` forgets less | all weights can move |
| of what must stay, too | any, with [replay](reference/retain.md) | see "Against forgetting" below |

| memory for training, besides activations | take |
|---|---|
| 18 bytes a parameter (float32, AdamW); 12 with `optimizer: adamw8bit` | `full`, `child_f` |
| 2 (bfloat16) or 4 bytes | every adapter, `bitfit` |
| 0.5 bytes (`quantization: nf4`) | {nf4} |

`tunewright estimate` counts it for your model, rows and machine.

| variants of one base, served at once | take | a further one costs |
|---|---|---|
| one | any; merged into the base where that goes (not {unmerged}) | nothing |
| dozens | `lora`, `rslora`, `dylora`, {soft} | its file: all share the base's weights and one batch |
| some | {delta} | the tensors that it changes: all others are shared |
| few | other adapters, {weights} | a copy of the model |

An illegal combination (a tuner over a base precision it cannot train, a model without the layers it needs) is refused
before anything is loaded, with the reason. What each tuner leaves and needs is in the [reference](reference/tuners.md).
"""


def which() -> str:
    """The top of the page, the tuners' lists taken from their capability rows."""
    cards = {name: TUNERS.load(name).card for name in TUNERS}
    lists = {
        "nf4": [n for n, c in cards.items() if c.works_on_nf4],
        "unmerged": [n for n, c in cards.items() if not c.mergeable],
        "soft": [n for n, c in cards.items() if c.artefact == "adapter" and not c.identity_at_start],
        "delta": [n for n, c in cards.items() if c.artefact == "delta"],
        "weights": [n for n, c in cards.items() if c.artefact == "weights"],
    }
    return TOP.format(**{key: ", ".join(f"`{n}`" for n in names) for key, names in lists.items()})


EXPLAINED = """**Gain**: base's minus tuned model's loss on the held-out rows (nats a trained token, mean over rows),
averaged over seeds, with the paired 95 % interval over rows. **Of LoRA's**: the gain as a share of LoRA's. **Unrelated
text**: change of the loss on pages of Python's manual, which nobody trained on; above 0 is forgotten. **Weak**: the
interval holds 0, or the gain is below {enough:.0%} of LoRA's ({tiny:.0%} for {names}). Memory is the peak of the whole
process, the median over seeds. **Speed**: tokens/s, the share of LoRA's, and how many times peft's
own where it has the method, of `python -m benchmarks.tuners`, where runs alternate on an idle machine. Every method
ran at its own defaults.
"""


def write_page() -> None:
    """Write the page from all results that are there."""
    PAGE.write_text("\n".join([which(), *(section(f) for f in folders(RESULTS / "methods")), *more(RESULTS)]), "utf-8")


def section(folder: Path) -> str:
    """One data set: what it is, the table, who is weak."""
    runs: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        run = json.loads(path.read_text())
        runs[run["method"]].append(run)
    one = next(iter(runs.values()))[0]
    machine, data = one["machine"], one["data"]
    about = (
        f"## On {data['name']}\n\n{data['source']} (hash `{data['sha256']}`), {len(one['held_out'])} held-out rows; "
        f"{one['model']}, {one['settings']['n_epochs']} epochs, batches of {one['settings']['batch_size']}, "
        f"threads: {machine['threads']} of {machine['cpu']}.\n"
    )
    explained = EXPLAINED.format(
        enough=ENOUGH, tiny=ENOUGH_OF_TINY, names=", ".join(f"`{name}`" for name in sorted(TINY & set(TUNERS)))
    )
    reference = gain(runs[REFERENCE]).value if REFERENCE in runs else None
    order = [name for name in TUNERS if name in runs]
    rows = [row(name, runs[name], reference) for name in order]
    weak = [f"- `{name}`: {why}" for name in order if (why := weakness(name, runs[name], reference))]
    absent = [f"`{name}`" for name in TUNERS if name not in runs]
    lines = [about, explained, HEADER, *rows, ""]
    lines += ["**Weak here**", "", *weak, ""] if weak else ["Nobody is weak here.", ""]
    lines += [f"Not run yet: {', '.join(absent)}.", ""] if absent else []
    return "\n".join(lines)


HEADER = (
    "| method | seeds | trained | learning rate | memory GB | speed | gain (95 %) | of LoRA's | department right "
    "| unrelated text | file MB |\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def row(name: str, runs: Runs, reference: float | None) -> str:
    """A line of the table."""
    got, first = gain(runs), runs[0]
    forgotten = fmean(fmean(r["unrelated"]) - fmean(r["base"]["unrelated"]) for r in runs)
    cells = (
        f"`{name}`",
        str(len(runs)),
        f"{first['trainable']:,} ({first['trainable'] / first['parameters']:.2%})",
        f"{first['learning_rate']:g}",
        f"{median(r['peak_bytes'] for r in runs) / 1e9:.2f}",
        speed(name),
        f"{got.value:.3f} ({got.low:.3f} to {got.high:.3f})",
        "" if not reference else f"{got.value / reference:.0%}",
        right(runs, "department"),
        f"{forgotten:+.3f}",
        f"{first['artefact_bytes'] / 1e6:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def speed(name: str) -> str:
    """Of the measurement side by side, if it was made."""
    path = RESULTS / "tuners.json"
    found = json.loads(path.read_text())["tuners"].get(name) if path.is_file() else None
    if not found:
        return ""
    times = "" if found["of_peft"] is None else f"; {found['of_peft']:.1f} times peft's"
    return f"{found['tokens_per_second']:,.0f} ({found['of_lora']:.0%}{times})"


def gain(runs: Runs) -> Interval:
    """Loss before minus loss after on the held-out rows."""
    return change(runs, "held_out", sign=-1)


def right(runs: Runs, measure: str) -> str:
    """The share of right answers over all seeds, with its interval."""
    outcomes = [hit for r in runs for hit in r["outcomes"].get(measure, [])]
    if not outcomes:
        return ""
    found = share(outcomes)
    return f"{found.value:.0%} ({found.low:.0%} to {found.high:.0%})"


def weakness(name: str, runs: Runs, reference: float | None) -> str | None:
    """Why a method is weak, or None."""
    got, needed = gain(runs), ENOUGH_OF_TINY if name in TINY else ENOUGH
    if got.low <= 0:
        return f"its interval ({got.low:.3f} to {got.high:.3f}) does not exclude 0"
    if reference and got.value < needed * reference:
        return f"{got.value / reference:.0%} of LoRA's gain, less than {needed:.0%}"
    return None

"""docs/methods.md from the JSON files of benchmarks.methods: tables, who is weak, and how to choose."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

from tunewright.metrics.accuracy import share
from tunewright.metrics.intervals import Interval, paired_bootstrap
from tunewright.tuners import TUNERS

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
REFERENCE = "lora"
# of LoRA's gain; methods that train next to nothing are asked for less
ENOUGH, ENOUGH_OF_TINY = 0.5, 0.25
TINY = {"prompt", "prefix", "p_tuning", "bitfit", "ia3"}
Runs = Sequence[Mapping[str, Any]]

TOP = """# Methods, measured

Written by `make methods-table` from real runs; do not edit. The raw results are in `benchmarks/results/methods/`.

## Which one?

| you have | take | because |
|---|---|---|
| no reason to choose | `lora` | best known, fast path, served in one batch with others, mergeable |
| a model that does not fit | `lora` over a quantised base | `tunewright estimate` says what fits |
| fewer than about 100 rows | `lora` with a small `r`, or `ia3` | fewer trained numbers forget less and overfit later |
| thousands of rows, far from what it knows | `full`; `half` keeps more of the old | all weights can move |
| a rank you cannot decide on | `dylora` | one training, every rank up to `r` afterwards |
| dozens of variants to serve at once | `lora`, `rslora`, `dylora` | they share the base's weights and one batch |
| a fixed size of the change | `fishmask`, `bitfit` | exactly that many weights differ; applied and removed exactly |
| old skills to keep | any, with fewer epochs; `half`, `child_d` | see the column "unrelated text" |

An illegal combination (a tuner over a base precision it cannot train, a model without the layers it needs) is refused
before anything is loaded, with the reason. What each tuner leaves and needs is in the [reference](reference/tuners.md).
"""

EXPLAINED = """**Gain**: base's minus tuned model's loss on the held-out rows (nats a trained token, mean over rows),
averaged over seeds, with the paired 95 % interval over rows. **Of LoRA's**: the gain as a share of LoRA's. **Unrelated
text**: change of the loss on pages of Python's manual, which nobody trained on; above 0 is forgotten. **Weak**: the
interval holds 0, or the gain is below {enough:.0%} of LoRA's ({tiny:.0%} for {names}). Memory is the peak of the whole
process, tokens/s counts training alone; medians over seeds. Every method ran at its own defaults.
"""


def write_page(results: Path) -> None:
    """Write the page. Raises SystemExit if there are no results yet."""
    folders = sorted(p for p in results.iterdir() if p.is_dir()) if results.is_dir() else []
    if not folders:
        raise SystemExit(f"{results} has no results yet.")
    PAGE.write_text("\n".join([TOP, *(section(folder) for folder in folders)]), encoding="utf-8")


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
        f"{machine['threads']} threads of {machine['cpu']}.\n"
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
    "| method | seeds | trained | learning rate | memory GB | tokens/s | gain (95 %) | of LoRA's | department right "
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
        f"{median(r['tokens_per_second'] for r in runs):,.0f}",
        f"{got.value:.3f} ({got.low:.3f} to {got.high:.3f})",
        "" if not reference else f"{got.value / reference:.0%}",
        right(runs, "department"),
        f"{forgotten:+.3f}",
        f"{first['artefact_bytes'] / 1e6:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def gain(runs: Runs) -> Interval:
    """Loss before minus loss after, rows averaged over seeds first."""
    before = [fmean(values) for values in zip(*(r["base"]["held_out"] for r in runs), strict=True)]
    after = [fmean(values) for values in zip(*(r["held_out"] for r in runs), strict=True)]
    return paired_bootstrap(before, after)


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

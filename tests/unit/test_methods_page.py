"""docs/methods.md is made of result files alone: who holds the old task, whether tuning pays, what a proxy moves."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tunewright.tuners import TUNERS

ROOT = Path(__file__).parents[2]
BASE = {"held_out": [3.0, 3.2, 2.8, 3.0] * 5, "old": [2.0, 2.4, 1.6, 2.0] * 5}
OF_RUNS = {
    "options": {}, "retained": 128, "model": "m",
    "settings": {"tuner": "lora", "n_epochs": 1, "batch_size": 8}, "base": BASE,
    "data": {"name": "demo", "source": "rows", "sha256": "d"},
    "old_task": {"name": "old", "source": "texts", "sha256": "o"},
}  # fmt: skip


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.fixture
def more() -> ModuleType:
    from benchmarks import methods_more

    return methods_more


def run(method: str, seed: int, held_out: float, old: float, wobble: float = 0.01) -> dict[str, Any]:
    """A result that changes every row by so much, but for a wobble."""
    changed = {"held_out": held_out, "old": old}
    after = {k: [v + changed[k] + wobble * (-1) ** i for i, v in enumerate(BASE[k])] for k in changed}
    return {**OF_RUNS, "method": method, "seed": seed, **after}


def cells(text: str, name: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_who_holds_loses_surely_less_and_still_learns(more: ModuleType) -> None:
    runs = [run("plain", seed, -2.0, 0.5) for seed in (1, 2)]
    runs += [run("good", seed, -1.9, 0.1) for seed in (1, 2)]
    runs += [run("lazy", 1, -0.5, 0.0), run("same", 1, -2.0, 0.5), run("unsure", 1, -2.0, 0.45, wobble=0.5)]
    text = more.forgetting(runs)
    assert next(line for line in text.splitlines() if line.startswith("| `")).startswith("| `plain` |")
    assert cells(text, "`plain`")[4].startswith("+0.500") and cells(text, "`plain`")[-1] == ""
    good = cells(text, "`good`")
    assert good[1] == "2" and good[4].startswith("+0.100") and good[5].startswith("+0.400 (")
    assert good[6].startswith("+1.900") and good[7:] == ["95%", "yes"]
    assert cells(text, "`lazy`")[-2:] == ["25%", "no"]  # it holds by not learning
    assert cells(text, "`same`")[-1] == cells(text, "`unsure`")[-1] == "no"


def test_only_seeds_that_both_have_are_compared(more: ModuleType) -> None:
    runs = [run("plain", 1, -2.0, 0.5), run("plain", 2, -2.0, 9.0), run("good", 1, -2.0, 0.4)]
    assert cells(more.forgetting(runs), "`good`")[5].startswith("+0.100 (")


def trained(method: str, gain: float, wobble: float = 0.01) -> dict[str, Any]:
    """A result of benchmarks.methods."""
    after = {"held_out": run(method, 1, -gain, 0.0, wobble)["held_out"], "unrelated": [2.5, 2.5]}
    base = {"held_out": BASE["held_out"], "unrelated": [2.0, 2.2]}
    cost = {"trainable": 10, "parameters": 1000, "learning_rate": 1e-3, "peak_bytes": 2e9, "tokens_per_second": 900.0}
    about = {**OF_RUNS, "settings": {"n_epochs": 3, "batch_size": 8}, "machine": {"threads": 1, "cpu": "cpu"}}
    right = {"department": [True, False, True, True]}
    return {**about, **cost, **after, "base": base, "method": method, "artefact_bytes": 3e6, "outcomes": right}


def test_a_method_is_weak_below_half_of_lora_s_gain_or_a_quarter(tmp_path: Path) -> None:
    from benchmarks.methods_page import section

    found = [trained("lora", 2.0), trained("ia3", 0.6), trained("bitfit", 0.4), trained("vera", 0.9)]
    found += [trained("dora", 1.1), trained("full", 1.9, wobble=9.0)]
    for result in found:
        (tmp_path / f"{result['method']}-1.json").write_text(json.dumps(result))
    text = section(tmp_path)
    weak = {line.split("`")[1]: line for line in text.splitlines() if line.startswith("- ")}
    assert set(weak) == {"bitfit", "vera", "full"}
    assert "20% of LoRA's gain, less than 25%" in weak["bitfit"] and "less than 50%" in weak["vera"]
    assert "does not exclude 0" in weak["full"]
    lora = cells(text, "`lora`")
    assert lora[2] == "10 (1.00%)" and lora[6].startswith("2.000 (1.99") and lora[7] == "100%" and lora[9] == "+0.400"
    assert lora[8].startswith("75% (")
    (absent,) = (line for line in text.splitlines() if line.startswith("Not run yet: "))
    assert {n for n in TUNERS if f"`{n}`" in absent} == set(TUNERS) - {r["method"] for r in found}


def variant(system: str, name: str, right: list[bool], **more: Any) -> dict[str, Any]:
    outcomes = {"team": right, "valid_json": [True] * len(right)}
    cost = {"prompt_tokens": 100.4, "completion_tokens": 9.6, "seconds": 0.25, "answers": ["x"] * len(right)}
    about = {"model": "m", "n_rows": len(right), "together": 16, "threads": 2, "machine": {"cpu": "cpu"}}
    return {"system": system, "name": name, "outcomes": outcomes, **cost, **about, **more}


def test_whether_tuning_pays_with_spread_and_cost(more: ModuleType) -> None:
    half = [True, False] * 20
    found = [variant("base", "", [False] * 40), variant("prompt", "a", half), variant("prompt", "b", [False] * 40)]
    files = {f"{v['system']}-{v['name']}": v for v in found}
    files["baselines"] = {"cards": {"majority class": {"team": [True] * 10 + [False] * 30}}}
    untrained = more.untuned(files)
    assert "The tuned model is not measured." in untrained and "Tuning" not in untrained
    text = more.untuned({**files, "tuned": variant("tuned", "", [True] * 40, training_seconds=61.5)})
    assert "Training took 62 s, once." in text and "Tuning pays here: on team" in text and "16 answers" in text
    assert cells(text, "prompt (x2)")[2].endswith("[0% to 50%]") and cells(text, "prompt (x2)")[2].startswith("25% (")
    assert cells(text, "tuned")[2].startswith("100% (") and cells(text, "tuned")[3:] == ["100", "10", "0.25"]
    assert cells(text, "majority class")[1:] == ["", "25% (14% to 40%)", "", "", ""]
    order = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")]
    assert order == ["system", "---", "base", "prompt (x2)", "tuned", "majority class"]


def test_a_proxy_is_moved_if_loss_and_answers_are(more: ModuleType) -> None:

    def system(loss: float, right: int) -> dict[str, Any]:
        hits = [i < right for i in range(20)]
        return {"losses": [loss + i % 2 for i in range(20)], "department": hits, "urgency": hits, "valid_json": hits}

    systems = {"large": system(3, 0), "proxy, alpha 1": system(2, 12), "proxy, alpha 2": system(2, 0)}
    text = more.proxy({"model": "m", "layers": 8, "rows": 20, "systems": systems})
    assert "than the large model alone: proxy, alpha 1." in text
    assert cells(text, "large")[2] == cells(text, "large")[-1] == ""
    assert cells(text, "proxy, alpha 1")[1:3] == ["2.500", "-1.000 (-1.000 to -1.000)"]
    assert cells(text, "proxy, alpha 1")[-1].startswith("+60 (")


def test_the_page_is_written_from_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import methods_page as pages

    page, results = tmp_path / "methods.md", tmp_path / "results"
    monkeypatch.setattr(pages, "PAGE", page)
    monkeypatch.setattr(pages, "RESULTS", results)
    pages.write_page()
    alone = page.read_text()
    assert "## Which one?" in alone and "Against forgetting:" not in alone and "{" not in alone
    named = {name for name in TUNERS if f"`{name}`" in alone}
    assert {n for n in TUNERS if TUNERS.load(n).card.artefact != "adapter"} <= named
    (results / "retain" / "old").mkdir(parents=True)
    (results / "retain" / "old" / "plain-1.json").write_text(json.dumps(run("plain", 1, -2.0, 0.5)))
    pages.write_page()
    assert "## Against forgetting: old" in page.read_text()


def test_what_is_there_is_not_measured_again(tmp_path: Path) -> None:
    from benchmarks.pieces import Piece, key_of, run_pieces
    from benchmarks.process import RivalFailed

    measured: list[str] = []

    def piece(name: str, key: str, fails: bool = False) -> Any:
        def measure() -> dict[str, Any]:
            measured.append(name)
            if fails:
                raise RivalFailed("no")
            return {"is": name}

        return Piece(name, tmp_path / "new" / f"{name}.json", key, measure)

    assert run_pieces([piece("a", "1"), piece("b", "1", fails=True)], lambda found: found["is"]) == 1
    assert run_pieces([piece("a", "1"), piece("b", "1")], str) == 0
    assert measured == ["a", "b", "b"]
    assert run_pieces([piece("a", "2")], str) == 0 and measured[-1] == "a"
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"key": "2", "is": "a"}
    data = tmp_path / "data"
    data.write_text("x")
    before = key_of({"n": 1}, [data])
    data.write_text("y")
    assert before != key_of({"n": 1}, [data]) != key_of({"n": 2}, [data])

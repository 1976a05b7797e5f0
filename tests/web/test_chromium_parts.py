"""The pages by hand, in a real browser: tuners and what goes with them, and recipes, from the form to the result."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest

import tiny

pytest.importorskip("selenium")
from chromium import MARKS, Browser

pytestmark = MARKS


@pytest.fixture(scope="module")
def train_file(folder: Path) -> Path:
    return tiny.write_rows(folder / "train.jsonl", tiny.sft_rows(16))


@pytest.fixture(scope="module")
def valid_file(folder: Path) -> Path:
    return tiny.write_rows(folder / "other.jsonl", tiny.sft_rows(22)[16:])


def test_a_job_with_a_soft_prompt_replay_and_a_mix_is_made_by_hand(
    browser: Browser, train_file: Path, valid_file: Path
) -> None:
    """Configured, reloaded in between, created, and run to its end with what was chosen."""
    browser.open("/jobs/new")
    browser.click("clear-draft")
    browser.upload("training_file", train_file)
    browser.until(lambda: "every line can be used" in browser.text("check-training_file"), "the check of the file")
    browser.choose("model", "tiny")
    browser.choose("tuner", "prompt")
    assert "usual learning rate 0.01" in browser.text("tuner-words")
    browser.unfold("options-tuner")
    browser.type("tuner-virtual_tokens", "5000")
    browser.choose("add-retain", "replay")
    browser.until(lambda: "replay" in browser.text("summary"), "the summary to follow")
    browser.click("create-job")
    said = browser.text("create-error")
    assert "Virtual tokens is 5000; allowed: a whole number from 1 to 1000" in said
    assert "Replay needs rows of what must not be forgotten" in said and "ftjob" not in browser.driver.current_url
    browser.type("tuner-virtual_tokens", "6")
    browser.upload("retain-1", valid_file)
    browser.until(lambda: "every line can be used" in browser.text("check-retain-1"), "the check of the old rows")
    browser.unfold("options-retain-1")
    browser.type("retain-1-share", "0.5")
    browser.click("add-mix")
    browser.upload("mix-2", valid_file)
    browser.until(lambda: "every line can be used" in browser.text("check-mix-2"), "the check of the second file")
    browser.type("mix-temperature", "2")
    browser.type("n_epochs", "1")
    browser.type("suffix", "by-hand")
    browser.until(lambda: "by-hand" in browser.text("summary"), "the summary to follow")
    browser.until(lambda: "The server would take this job" in browser.text("verdict"), "the server's word")
    browser.driver.refresh()
    browser.until(lambda: browser.value("suffix") == "by-hand", "the draft after a reload")
    for name in ("options-tuner", "options-retain-1"):
        browser.unfold(name)
    kept = {"tuner-virtual_tokens": "6", "retain-1-share": "0.5", "mix-temperature": "2"}
    browser.until(lambda: {n: browser.value(n) for n in kept} == kept, "every option after a reload")
    summary = browser.text("summary")
    assert "replay" in summary and "prompt" in summary and "1 further file" in summary
    browser.click("create-job")
    browser.until(lambda: "/jobs/ftjob-" in browser.driver.current_url, "the page of the new job")
    browser.until(lambda: browser.status() in ("succeeded", "failed"), "the job to end", 200)
    assert browser.status() == "succeeded"
    job_id = browser.driver.current_url.rpartition("/")[2]
    own = httpx.get(f"{browser.api}/v1/fine_tuning/jobs/{job_id}").json()["tunewright"]
    assert own["tuner"]["name"] == "prompt" and own["tuner"]["virtual_tokens"] == 6
    assert own["retain"][0]["name"] == "replay" and own["retain"][0]["share"] == 0.5
    assert own["mix"]["temperature"] == 2 and len(own["mix"]["files"]) == 1


def test_a_chain_is_made_by_hand(browser: Browser, folder: Path, train_file: Path) -> None:
    """RLHF by one choice, one stage taken away again, another put in its place; reloaded in between, and started."""
    pairs = tiny.write_rows(folder / "pairs.jsonl", tiny.pair_rows(12))
    browser.open("/jobs/new")
    browser.click("clear-draft")
    browser.upload("training_file", train_file)
    browser.until(lambda: "every line can be used" in browser.text("check-training_file"), "the check of the file")
    browser.choose("model", "tiny")
    browser.type("n_epochs", "1")
    browser.pick("add-stage", "RLHF")
    browser.until(lambda: "sft, then reward, then ppo" in browser.text("summary"), "the stages in the summary")
    browser.unfold("options-stage-3-objective")
    assert browser.value("stage-3-objective-reward_model") == "stage:reward"
    asked = [{"messages": row["messages"][:2], "answer": "blue"} for row in tiny.sft_rows(12)]
    browser.upload("chain-2", tiny.write_rows(folder / "asked.jsonl", asked))
    browser.until(lambda: "every line can be used" in browser.text("check-chain-2"), "the check of the prompts")
    browser.choose("stage-3-objective", "dpo")
    browser.until(lambda: "12 problems" in browser.text("check-chain-2"), "the check of the prompts as pairs")
    browser.click("remove-stage-3")
    browser.pick("add-stage", "One more stage")
    browser.choose("stage-3-objective", "dpo")
    browser.pick("stage-3-model", "Stage 1: sft")
    browser.click("create-job")
    told = browser.text("create-error")
    assert "Stage 'reward': Choose a training file." in told and "Stage 'dpo': Choose a training file." in told
    for key in ("chain-1", "chain-3"):
        browser.upload(key, pairs)
        browser.until(lambda k=key: "every line can be used" in browser.text(f"check-{k}"), "the check of the pairs")
    browser.type("stage-3-n_epochs", "2")
    browser.type("suffix", "by-stages")
    browser.until(lambda: "The server would take this job" in browser.text("verdict"), "the server's word")
    browser.driver.refresh()
    browser.until(lambda: browser.value("stage-3-n_epochs") == "2", "the draft after a reload")
    browser.until(lambda: "sft, then reward, then dpo" in browser.text("summary"), "the stages after a reload")
    browser.unfold("job-file")
    told = browser.text("job-file")
    assert "- name: dpo\n  model: stage:sft\n  training_file: pairs.jsonl" in told and "n_epochs: 2" in told
    browser.click("create-job")
    browser.until(lambda: "/jobs/ftjob-" in browser.driver.current_url, "the page of the new chain")
    browser.until(lambda: browser.all("stage-link"), "the first stage's job", 200)
    stages = browser.text("stages")
    assert all(name in stages for name in ("sft", "reward", "dpo")) and "Waiting" in stages
    browser.click("cancel-job")
    browser.click("confirm-yes")
    browser.until(lambda: browser.status() == "cancelled", "the chain to be cancelled", 120)


def test_what_does_not_go_together_cannot_be_taken(browser: Browser) -> None:
    """Over a frozen base no tuner of the base's own weights; without bitsandbytes none in few bits. One reason each."""
    browser.open("/jobs/new")
    browser.get("tuner", 240)
    browser.choose("tuner", "full")
    held = browser.items("quantization")
    closed = {text: free for text, free in held.items() if "nf4" in text or "int8" in text}
    assert len(closed) == 2 and not any(closed.values()), held
    assert all("needs the package bitsandbytes" in t or "full trains the base itself" in t for t in closed)
    browser.close_list()
    browser.choose("tuner", "lora")


def test_recipes_are_made_compared_and_deleted_by_hand(browser: Browser, train_file: Path) -> None:
    browser.open("/recipes")
    assert "No recipes yet" in browser.get("no-recipes", 240).text
    browser.choose("recipe", "few_shot")
    browser.click("create-recipe")
    assert browser.text("recipe-error").endswith("Choose a file of solved rows.")
    browser.upload("rows", train_file)
    browser.until(lambda: "every line can be used" in browser.text("check-rows"), "the check of the rows")
    browser.unfold("options-recipe")
    browser.type("recipe-k", "2")
    browser.type("suffix", "shots")
    time.sleep(1)  # typing is told once it rests
    browser.driver.refresh()
    browser.until(lambda: browser.value("suffix") == "shots", "the draft after a reload")
    browser.click("create-recipe")
    browser.until(lambda: ":shots:" in browser.text("recipe-list"), "the recipe in the list")
    browser.choose("recipe", "prompt")
    browser.unfold("options-recipe")
    browser.click("create-recipe")
    assert "it changes nothing; give 'system', 'template' or both" in browser.text("recipe-error")
    browser.type("recipe-system", "Answer with one colour.")
    browser.type("suffix", "colour")
    time.sleep(1)
    browser.click("create-recipe")
    browser.until(lambda: ":colour:" in browser.text("recipe-list"), "the second recipe")
    browser.shoot("recipes")
    for name in ("tiny", ":shots:", ":colour:"):
        browser.choose("compare-models", name, many=True)
    browser.type("compare-question", "what colour is the sky?")
    browser.click("compare-ask")
    said = browser.get("compare-answers", 300).text
    assert ":shots:" in said and ":colour:" in said and "no recipe" not in said
    browser.driver.refresh()
    browser.until(lambda: browser.get("compare-answers", 240).text == said, "the answers after a reload")
    for left in (1, 0):
        browser.click("delete-recipe")
        browser.click("confirm-yes")
        browser.until(lambda n=left: len(browser.all("delete-recipe")) == n, "one recipe fewer")
    assert "No recipes yet" in browser.text("no-recipes")

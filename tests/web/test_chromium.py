"""A real browser drives the real stack: API, training worker, engine and dashboard, each in its own process.

With TUNEWRIGHT_SCREENSHOTS=1 the pictures of docs/images are taken on the way; TUNEWRIGHT_SCREENSHOT_DATA=FILE and
TUNEWRIGHT_SCREENSHOT_MODEL=NAME then choose a real data set and model instead of the tiny ones.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from stack import Program

import tiny

pytest.importorskip("selenium")
from chromium import MARKS, Browser
from selenium.webdriver.common.keys import Keys

pytestmark = MARKS
REAL_DATA = os.environ.get("TUNEWRIGHT_SCREENSHOT_DATA")
MODEL = os.environ.get("TUNEWRIGHT_SCREENSHOT_MODEL", "tiny")
EPOCHS = 3 if REAL_DATA else 30  # long enough to be watched
TRAIN_SECONDS = 3600 if REAL_DATA else 400


@pytest.fixture(scope="module")
def train_file(folder: Path) -> Path:
    path = folder / "clinic-train.jsonl"
    return Path(shutil.copy(REAL_DATA, path)) if REAL_DATA else tiny.write_rows(path, tiny.sft_rows(60))


@pytest.fixture(scope="module")
def valid_file(train_file: Path) -> Path:
    """Held-out rows; of a real data set the first few of the file beside it."""
    path = train_file.with_name("clinic-heldout.jsonl")
    if not REAL_DATA:
        return tiny.write_rows(path, tiny.sft_rows(64)[60:])
    lines = Path(REAL_DATA.replace("_train", "_heldout")).read_text().splitlines()
    path.write_text("\n".join(lines[:24]) + "\n")
    return path


@pytest.fixture(scope="module")
def question(train_file: Path) -> str:
    """What the first row's user says."""
    messages = json.loads(train_file.read_text().splitlines()[0])["messages"]
    return next(m["content"] for m in messages if m["role"] == "user")


@pytest.fixture(scope="module")
def job_path(browser: Browser, train_file: Path, valid_file: Path, folder: Path) -> str:
    """The page of a job that was created in the browser: first with a bad file, then with a good one."""
    browser.open("/jobs")
    assert "Train your first model" in browser.text("no-jobs")
    browser.shoot("empty")
    browser.click("new-job")
    bad = folder / "clinic-draft.jsonl"
    lines = train_file.read_text().splitlines()
    for i in range(3, len(lines), 9):
        lines[i] = lines[i].replace('"assistant"', '"assistent"')
    bad.write_text("\n".join(lines) + "\n")
    browser.upload("training_file", bad)
    table = browser.text("problems-training_file")
    assert "assistent" in table and "4" in table.split()
    browser.shoot("data-check")
    browser.click("remove-training_file")
    browser.upload("training_file", train_file)
    browser.until(lambda: "every line can be used" in browser.text("check-training_file"), "the check of the file")
    browser.upload("validation_file", valid_file)
    browser.until(lambda: valid_file.name in browser.text("validation_file"), "the second file")
    browser.choose("model", MODEL)
    browser.type("suffix", "clinic-triage")
    browser.type("n_epochs", str(EPOCHS))
    if REAL_DATA:
        browser.type("learning_rate", "0.001")
    browser.until(lambda: f"{EPOCHS} epochs" in browser.text("summary"), "the summary to follow")
    browser.driver.refresh()
    browser.until(lambda: browser.get("suffix").get_attribute("value") == "clinic-triage", "the draft after a reload")
    assert train_file.name in browser.text("training_file")
    browser.shoot("new-job")
    browser.click("create-job")
    browser.until(lambda: "/jobs/ftjob-" in browser.driver.current_url, "the page of the new job")
    return browser.driver.current_url.removeprefix(browser.url)


@pytest.fixture(scope="module")
def finished(browser: Browser, job_path: str) -> str:
    browser.open(job_path)
    browser.until(lambda: browser.status() == "succeeded", "the job to succeed", TRAIN_SECONDS)
    return job_path


def test_the_chart_moves_while_the_job_trains_and_is_there_after_a_reload(browser: Browser, job_path: str) -> None:
    browser.open(job_path)
    first = browser.until(browser.drawn_points, "the first point of the chart", TRAIN_SECONDS)
    assert browser.status() == "running" and "Step" in browser.text("progress-words")
    later = browser.until(lambda: browser.drawn_points() > first and browser.drawn_points(), "the chart to move", 60)
    browser.shoot("job-running")
    browser.driver.refresh()
    again = browser.until(browser.drawn_points, "the chart after the reload")
    assert again >= later
    assert browser.get("loss-chart").get_attribute("aria-label")


def test_a_finished_job_shows_its_result(browser: Browser, finished: str) -> None:
    browser.until(lambda: browser.all("checkpoint-playground"), "checkpoints")
    total = int((browser.get("loss-chart").get_attribute("data-points")) or 0)
    assert browser.drawn_points() == total > 10
    assert "successfully completed" in browser.text("events")
    assert browser.text("tuned-model").startswith(f"ft:{MODEL}:")
    assert str(EPOCHS) in browser.text("facts").split()
    browser.until(lambda: browser.all("download-result"), "the result file")
    link = browser.all("download-result")[0].get_attribute("href")
    script = "return await (await fetch(arguments[0])).text()"
    assert browser.driver.execute_script(script, link).startswith("step,train_loss")
    browser.shoot("job")


def test_base_and_tuned_answer_side_by_side_and_stay_after_a_reload(
    browser: Browser, finished: str, question: str
) -> None:
    browser.open(finished)
    browser.click("open-playground")
    browser.until(lambda: "ft:" in (browser.get("model-right").get_attribute("value") or ""), "the tuned model")
    assert browser.get("model-left").get_attribute("value") == MODEL
    for side in ("left", "right"):
        browser.type(f"max_tokens-{side}", "64" if REAL_DATA else "16")
    browser.get("question").send_keys(question, Keys.ENTER)
    notes = ("note-left", "note-right")
    browser.until(lambda: all("tokens in" in browser.text(n) for n in notes), "two answers", 300)
    answers = [e.text for e in browser.all("message-assistant")]
    assert len(answers) == 2 and answers[0] != answers[1]
    browser.shoot("playground")
    browser.driver.refresh()
    browser.until(lambda: [e.text for e in browser.all("message-assistant")] == answers, "the answers after a reload")


def test_an_api_that_dies_is_said_and_its_return_is_noticed(browser: Browser, api: Program, finished: str) -> None:
    browser.open(finished)
    browser.get("loss-chart")
    api.stop()
    browser.get("api-down", 30)
    api.start()
    browser.until(lambda: not any(e.is_displayed() for e in browser.all("api-down")), "the banner to go", 90)
    assert browser.status() == "succeeded"


def test_a_dashboard_that_dies_comes_back_to_the_same_page(browser: Browser, web: Program, finished: str) -> None:
    browser.open(finished)
    before = browser.until(browser.drawn_points, "the chart")
    browser.driver.execute_script("window.beforeTheRestart = true")
    web.kill()
    web.start()
    gone = "return window.beforeTheRestart === undefined"
    browser.until(lambda: browser.driver.execute_script(gone), "the page to load itself again", 90)
    assert browser.until(browser.drawn_points, "the chart after the restart") == before


def test_the_browser_had_nothing_to_complain_about_and_asked_nobody_else(browser: Browser, finished: str) -> None:
    browser.driver.get_log("browser")
    for path in ("/jobs", finished, "/jobs/new", "/recipes", "/playground"):
        browser.open(path)
        time.sleep(1)
        script = "return performance.getEntriesByType('resource').map(e => e.name)"
        foreign = [u for u in browser.driver.execute_script(script) if not u.startswith((browser.url, "data:"))]
        assert foreign == []
    severe = [e["message"] for e in browser.driver.get_log("browser") if e["level"] == "SEVERE"]
    assert severe == []

"""Chromium, and words for what the tests do with it. With TUNEWRIGHT_SCREENSHOTS=1 the pictures of docs/images are
taken on the way."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver import Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MARKS = [
    pytest.mark.slow,
    pytest.mark.browser,
    pytest.mark.skipif(not BROWSER or not DRIVER, reason="needs chromium and chromium-driver (Debian's packages)"),
]
IMAGES = Path(__file__).parents[2] / "docs" / "images"
SHOOT = os.environ.get("TUNEWRIGHT_SCREENSHOTS") == "1"
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --window-size=1280,800 --force-device-scale-factor=1 --lang=en"
)
ITEMS = ".q-menu .q-item"


@dataclass
class Browser:
    """Chromium, and words for what the tests do with it."""

    driver: Chrome
    url: str
    api: str

    def open(self, path: str) -> None:
        self.driver.get(self.url + path)

    def all(self, name: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, f"[data-testid='{name}']")

    def get(self, name: str, seconds: float = 60) -> WebElement:
        """The first visible element of this name, waited for."""
        return self.until(lambda: next((e for e in self.all(name) if e.is_displayed()), None), name, seconds)

    def until(self, found: Callable[[], Any], what: str, seconds: float = 60) -> Any:
        """Wait for something true."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                value = found()
            except StaleElementReferenceException:
                value = None
            if value:
                return value
            time.sleep(0.1)
        self.driver.save_screenshot("/tmp/tunewright-test-failed.png")
        page = self.driver.find_element(By.TAG_NAME, "body").text
        raise AssertionError(f"waited {seconds} s for {what}. The page says:\n{page}")

    def act(self, name: str, do: Callable[[WebElement], None], seconds: float = 60) -> None:
        """Do something with an element; once more if the page put another in its place meanwhile."""

        def done() -> bool:
            do(self.get(name, seconds))
            return True

        self.until(done, f"something to do with {name}", seconds)

    def click(self, name: str, seconds: float = 60) -> None:
        def click(element: WebElement) -> None:
            self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
            element.click()

        self.act(name, click, seconds)

    def type(self, name: str, text: str) -> None:
        def enter(element: WebElement) -> None:
            element.send_keys(Keys.CONTROL, "a")
            element.send_keys(text)

        self.act(name, enter)

    def upload(self, role: str, path: Path) -> None:
        def give(zone: WebElement) -> None:
            zone.find_element(By.CSS_SELECTOR, "input[type=file]").send_keys(str(path))

        self.act(f"upload-{role}", give, 240)

    def text(self, name: str) -> str:
        return self.until(lambda: (self.get(name).text,), f"the text of {name}")[0]

    def status(self) -> str:
        """The status of the job on the right side."""
        chips = self.get("job").find_elements(By.CSS_SELECTOR, "[data-testid='status']")
        return chips[0].get_attribute("data-status") or "" if chips else ""

    def drawn_points(self) -> int:
        """Points that ECharts itself holds for the training loss."""
        script = """
            const plot = document.querySelector("[data-testid='loss-chart'] .tw-plot");
            const chart = plot && getElement(parseInt(plot.id.slice(1))).chart;
            return chart ? chart.getModel().getSeriesByIndex(0).getData().count() : 0;
        """
        return self.driver.execute_script(script)

    def shoot(self, name: str) -> None:
        if SHOOT:
            IMAGES.mkdir(parents=True, exist_ok=True)
            time.sleep(0.7)
            self.driver.save_screenshot(str(IMAGES / f"{name}.png"))

    # --- drop-downs --------------------------------------------------------------------------------------------------

    def items(self, name: str) -> dict[str, bool]:
        """The entries of a drop-down: text -> whether it can be taken. Leaves it open."""
        self.click(name)
        entries = self.until(lambda: self.driver.find_elements(By.CSS_SELECTOR, ITEMS), f"the entries of {name}")
        return {e.text: e.get_attribute("aria-disabled") != "true" for e in entries}

    def closed(self) -> bool:
        return not self.driver.find_elements(By.CSS_SELECTOR, ITEMS)

    def close_list(self) -> None:
        self.driver.find_element(By.TAG_NAME, "body").send_keys(Keys.ESCAPE)
        self.until(self.closed, "the list to close")

    def choose(self, name: str, value: str, many: bool = False) -> None:
        """Take the entry that is `value`, in letters of any case, or ends with `(value)`. many: of a list of which
        several are taken, which stays open; there it may also be a part of the name."""

        def wanted(text: str) -> bool:
            return text.lower() == value or text.endswith(f"({value})") or (many and value in text)

        def entry() -> WebElement | None:
            return next((e for e in self.driver.find_elements(By.CSS_SELECTOR, ITEMS) if wanted(e.text)), None)

        self.click(name)
        self.until(entry, f"{value} in {name}").click()
        self.close_list() if many else self.until(self.closed, "the list to close")

    def pick(self, name: str, words: str) -> None:
        """Take the entry that begins with these words."""

        def entry() -> WebElement | None:
            found = self.driver.find_elements(By.CSS_SELECTOR, ITEMS)
            return next((e for e in found if e.text.startswith(words)), None)

        self.click(name)
        self.until(entry, f"{words} in {name}").click()
        self.until(self.closed, "the list to close")

    def unfold(self, name: str) -> None:
        """Open a folded block of options, and wait until nothing moves any more."""
        block = self.get(name)
        block.find_element(By.CSS_SELECTOR, ".q-item").click()
        heights: list[int] = [0]
        while heights[-1] != (height := block.size["height"]) or len(heights) < 3:
            heights.append(height)
            time.sleep(0.3)

    def value(self, name: str) -> str:
        return self.get(name).get_attribute("value") or ""


def start_browser(profile: Path, url: str, api: str) -> Browser:
    os.environ["SE_OFFLINE"] = "true"
    options = ChromeOptions()
    assert BROWSER and DRIVER
    options.binary_location = BROWSER
    for flag in [*FLAGS.split(), f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = Chrome(options=options, service=Service(DRIVER))
    size = {"width": 1280, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.set_script_timeout(120)
    return Browser(driver, url, api)

"""The page as a user sees it, in Chromium."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

from tests.support.server import KEY

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
PATIENCE_S = 30
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,1000",
)


@contextmanager
def chromium(folder: Path) -> Iterator[WebDriver]:
    """A browser with its files in `folder`; skips the test where there is none."""
    if not (CHROMIUM and DRIVER):
        pytest.skip("no Chromium (Debian packages chromium and chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={folder}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The page of the server at an address."""

    def __init__(self, browser: WebDriver, url: str) -> None:
        self.browser = browser
        browser.get_log("browser")  # of the last page
        browser.get(f"{url}/rlkv")

    def get(self, name: str) -> WebElement:
        return self.browser.find_element(By.ID, name)

    def wait_for(self, what: str, is_there: object) -> None:
        WebDriverWait(self.browser, PATIENCE_S, poll_frequency=0.05).until(
            lambda _: is_there(),  # type: ignore[operator]
            f"{what}: {self.browser.find_element(By.TAG_NAME, 'body').text}",
        )

    def unlock(self, key: str = KEY) -> None:
        self.wait_for("key field", self.get("key").is_displayed)
        self.get("key").send_keys(key, Keys.ENTER)

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.browser.get_log("browser")]

    def watch_meter(self) -> None:
        """Keep the largest figure that the meter ever shows."""
        self.browser.execute_script(
            """window.most = 0;
            new MutationObserver(() => {
              const meter = document.querySelector("#use-bars [role=meter]");
              window.most = Math.max(window.most, +meter.getAttribute("aria-valuenow"));
            }).observe(document.getElementById("use-bars"), { childList: true });"""
        )

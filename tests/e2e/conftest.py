"""One server for all end-to-end tests that need no other."""

from __future__ import annotations

import os
from collections.abc import Iterator

import openai
import pytest
from selenium.webdriver.remote.webdriver import WebDriver

from tests.support.asking import client_of
from tests.support.page import chromium
from tests.support.server import KEY, Server

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # its price list would come from the network


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    with Server(["--api-key", KEY], log) as running:
        yield running


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture(scope="session")
def client(server: Server) -> openai.OpenAI:
    return client_of(server)

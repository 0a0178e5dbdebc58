"""README.md and the first steps, followed as a newcomer does.

Every command in them stands in one of two lists here: it is run as written, but for the port and
the interpreter; or it needs the network, a GPU, a real model or Docker, and is only parsed.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import shlex
import signal
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from rlkv_vllm.bench.server import free_port
from tests.support import ROOT
from tests.support.server import ANSWER_TIMEOUT_S, Server, environment
from tests.unit.test_prose import lines_of, problem_of, prose

PAGES = (ROOT / "README.md", ROOT / "docs" / "start.md")

#: Run as written; the server's address is that of the pages but for the port.
RUN = {
    "make serve",
    "rlkv doctor",
    "rlkv profile show embedded",
    "rlkv testbed sample --n 5",
    "curl http://127.0.0.1:8000/v1/chat/completions",  # its question stands in the page
}
PARSED = {
    "rlkv --install-completion",
    "rlkv profile",
    "docker compose -f deploy/compose.yaml up --build --wait",
    "make test",
    "pip install '.[cpu]'",
    "pip install '.[gpu]'",
    "pip install torch==2.13.0+cpu --extra-index-url https://download.pytorch.org/whl/cpu",
    "rlkv bench Qwen/Qwen3-4B-Thinking-2507 --profile my_profile.json --sparsity 0.5 --memory 8GiB",
    "rlkv eval --max-loss 2% --write-rows",
    "rlkv eval Qwen/Qwen3-4B-Thinking-2507 --profile my_profile.json --task problems.jsonl",
    "rlkv profile import FOLDER --model MODEL -o my_profile.json",
    "rlkv profile import PUBLISHED_FOLDER --model Qwen/Qwen3-4B-Thinking-2507 -o my_profile.json",
    "rlkv profile plan Qwen/Qwen3-4B-Thinking-2507 my_profile.json --sparsity 0.5 "
    "--max-model-len 32768 --memory 8GiB",
    "rlkv refine",
    "rlkv score MODEL --task problems.jsonl -o my_profile.json",
    "rlkv serve",
    "rlkv serve --max-loss 2%",
    "rlkv serve Qwen/Qwen3-4B-Thinking-2507 --profile my_profile.json --sparsity 0.5 "
    "--max-model-len 32768 --reasoning-parser deepseek_r1",
    "rlkv train",
    "rlkv train run.yaml",
}

#: `make serve` with the packages that the tests run with: nothing is installed.
_MAKE_SERVE = (
    f'exec make -C "{ROOT}" serve -o .venv/.installed-serve '
    f'BIN="{Path(sys.executable).parent}" PORT="$4" ARGS="$1 $2"'
)


def blocks(page: Path, language: str) -> list[str]:
    """Code blocks of a page, without what a list indents them by."""
    found: list[list[str]] = []
    is_open = is_asked = False
    for _, line, is_code in lines_of(page.read_text()):
        if line.strip().startswith("```"):
            is_open = not is_open
            is_asked = is_open and line.strip() == f"```{language}"
            if is_asked:
                found.append([])
        elif is_code and is_asked:
            found[-1].append(line)
    indents = [len(block[0]) - len(block[0].lstrip()) for block in found]
    return [
        "\n".join(line[indent:] for line in block)
        for block, indent in zip(found, indents, strict=True)
    ]


def commands() -> dict[str, str]:
    """All commands of the pages; the key is the command without the options of ``curl``."""
    found: set[str] = set()
    for page in PAGES:
        for block in blocks(page, "bash"):
            pending = ""
            for line in block.replace("\\\n", " ").splitlines():
                # "# CPU ...: only pip install X" and "# or: rlkv serve" name commands, too.
                code, _, comment = f" {line} ".partition(" # ")
                found |= set(re.findall(r"(?:or:|only) ((?:pip|rlkv) .*)", comment))
                pending = f"{pending}\n{code}".strip()
                try:
                    shlex.split(pending)
                except ValueError:  # a quotation goes on in the next line
                    continue
                found.add(pending)
                pending = ""
            assert not pending, f"{page}: {pending}"
        spans = re.findall(r"`([^`]+)`", prose(page))
        found |= {span for span in spans if re.match(r"(rlkv|make|docker|pip|curl) ", span)}
    texts = {re.sub(r"\s+", " ", one).strip() for one in found if one}
    return {re.sub(r"^(curl \S+) .*", r"\1", text): text for text in texts}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("newcomer") / "log"
    with Server([], log, ("bash", "-c", _MAKE_SERVE, "make")) as running:
        yield running


def run(command: str, folder: Path, server: Server | None = None) -> str:
    """In a shell in which ``rlkv`` is the one under test; its output."""
    program = folder / "rlkv"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m rlkv_vllm "$@"\n')
    program.chmod(0o755)
    if server is not None:
        command = command.replace(":8000/", f":{server.port}/")
    variables = environment()
    done = subprocess.run(
        ["bash", "-c", command],
        env=variables | {"PATH": f"{folder}:{variables['PATH']}"},
        capture_output=True,
        text=True,
        timeout=2 * ANSWER_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_every_command_is_run_or_parsed_here() -> None:
    assert set(commands()) == RUN | PARSED


@pytest.mark.parametrize("command", sorted(RUN | PARSED))
def test_what_a_command_names_exists(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "rlkv":
        assert problem_of(command) is None
    elif words[0] == "make":
        assert re.search(rf"(?m)^{words[1]}:.*##", (ROOT / "Makefile").read_text())
    elif words[0] == "pip" and words[2].startswith("."):
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        assert words[2][2:-1] in extras["optional-dependencies"]
    elif words[0] == "pip":
        makefile = (ROOT / "Makefile").read_text()
        assert f"TORCH := {words[2]}\nTORCH_INDEX := {words[4]}\n" in makefile
    elif words[0] == "docker":
        assert (ROOT / words[words.index("-f") + 1]).exists()


def test_python_blocks_call_what_exists() -> None:
    """They load a real model: imports, functions and keyword arguments only."""
    for page in PAGES:
        for block in blocks(page, "python"):
            names: dict[str, Any] = {}
            for node in ast.walk(ast.parse(block)):
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(str(node.module))
                    names |= {alias.name: getattr(module, alias.name) for alias in node.names}
                elif isinstance(node, ast.Call):
                    assert isinstance(node.func, ast.Name)
                    given = {keyword.arg: None for keyword in node.keywords if keyword.arg}
                    inspect.signature(names[node.func.id]).bind(*node.args, **given)


def test_doctor_finds_nothing_wrong(tmp_path: Path) -> None:
    output = run(f"rlkv doctor --port {free_port()}", tmp_path)
    assert "vLLM" in output


def test_more_questions_are_printed(tmp_path: Path) -> None:
    assert len(run("rlkv testbed sample --n 5", tmp_path).splitlines()) >= 5


def test_make_serve_proves_the_split(server: Server) -> None:
    assert "as read back from the engine" in server.output()
    assert "Traceback" not in server.output()


def test_the_first_question_is_answered(server: Server, tmp_path: Path) -> None:
    curl = commands()["curl http://127.0.0.1:8000/v1/chat/completions"]
    (message,) = [one["message"] for one in json.loads(run(curl, tmp_path, server))["choices"]]
    assert len(message["reasoning"].split()) > 20
    assert re.fullmatch(r"\S+ \S+", message["content"].strip())


def test_the_page_shows_what_the_readme_says(server: Server) -> None:
    """Head map, cache in use, forecast, chat."""
    readme = PAGES[0].read_text()
    (address,) = re.findall(r"<(http://127\.0\.0\.1:8000/\S+)>", readme)
    assert "head map, cache in use, forecast, chat" in readme
    with urllib.request.urlopen(address.replace(":8000/", f":{server.port}/")) as answer:
        page = answer.read().decode()
    for part in ("map", "held", "requests-range", "question"):
        assert f'id="{part}"' in page


def test_an_idle_server_stops_at_once(server: Server) -> None:
    """SIGTERM; status 0, and nothing had to be killed."""
    (rlkv,) = psutil.Process(server.process.pid).children()
    children = server.children()
    rlkv.send_signal(signal.SIGTERM)
    assert server.end_of(children) == (0, [])
    assert "force killing" not in server.output()

"""Prose: lengths of lines, words, links, and commands that exist.

Markdown, docstrings, comments, messages and templates. Reports are dated: their commands may be
those of an earlier commit.
"""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from rlkv_vllm.bench.cases import CASES
from rlkv_vllm.cli import app
from tests.support import ROOT

WIDTH = 100
BANNED = re.compile(
    r"(?<![a-z])(mend(s|ed|ing)?|dealt|settle\w*|paid[\s#]+for|whoever|twins?|whole (KV )?caches?)"
    r"(?![a-z])",
    re.IGNORECASE,
)
#: Somebody else's name: file and words.
ALLOWED: set[tuple[str, str]] = set()
#: Text that a user or contributor reads.
TEXT = {".html", ".j2", ".md", ".py", ".sh", ".toml", ".yaml", ".yml"}
#: Roots of the paths that pages name.
ROOTS = (ROOT, ROOT / "rlkv_vllm")


@cache
def tracked() -> tuple[Path, ...]:
    """Files of the repository; without git (a source archive) all files."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        listed = [
            str(path.relative_to(ROOT))
            for path in ROOT.rglob("*")
            if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
        ]
    return tuple(ROOT / name for name in listed if (ROOT / name).is_file())


def pages(*, reports: bool = True) -> list[Path]:
    found = [path for path in tracked() if path.suffix == ".md"]
    assert len(found) > 20
    return [path for path in found if reports or (ROOT / "reports") not in path.parents]


def lines_of(text: str) -> Iterator[tuple[int, str, bool]]:
    """Number, line, whether it is code."""
    is_code = False
    for number, line in enumerate(text.splitlines(), 1):
        fence = line.strip().startswith("```")
        yield number, line, is_code or fence
        is_code ^= fence


def prose(path: Path) -> str:
    return "\n".join(line for _, line, is_code in lines_of(path.read_text()) if not is_code)


def at(path: Path, number: int, what: str) -> str:
    return f"{path.relative_to(ROOT)}:{number}: {what}"


def test_lines_of_pages_are_short() -> None:
    """Code, tables and what cannot be broken excepted: a code span, a link's address."""
    unbreakable = re.compile(r"`[^`]*`|\]\([^)]*\)|https?://\S+|^\s*!\[[^\]]*\]")
    long = [
        at(path, number, line[:60])
        for path in pages()
        for number, line, is_code in lines_of(path.read_text())
        if len(line) > WIDTH
        and not is_code
        and not line.lstrip().startswith("|")
        and len(unbreakable.sub("", line)) > WIDTH - 40
    ]
    assert not long, report(long)


def test_lines_of_docstrings_and_comments_are_short() -> None:
    long = [
        at(path, number, line[:60])
        for path in tracked()
        if path.suffix == ".py"
        for number, line in prose_of_python(path)
        if len(line) > WIDTH and "://" not in line
    ]
    assert not long, report(long)


def prose_of_python(path: Path) -> Iterator[tuple[int, str]]:
    text = path.read_text()
    source = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            yield token.start[0], token.line.rstrip()
        elif token.type == tokenize.STRING and token.string.startswith(('"""', 'r"""')):
            for number in range(token.start[0], token.end[0] + 1):
                yield number, source[number - 1]


def test_words_that_are_not_ours() -> None:
    found = [
        at(path, text.count("\n", 0, match.start()) + 1, match[0])
        for path in tracked()
        if (path.suffix in TEXT or path.name in ("Dockerfile", "Makefile"))
        and path != Path(__file__)
        and ROOT / "docs" / "runs" not in path.parents  # made by an earlier version
        for text in [path.read_text()]
        for match in BANNED.finditer(text)
        if (str(path.relative_to(ROOT)), match[0].lower()) not in ALLOWED
    ]
    assert not found, report(found)


def report(found: list[str]) -> str:
    files = {one.split(":")[0] for one in found}
    return f"{len(found)} in {len(files)} files\n" + "\n".join(found)


# Links


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@cache
def anchors(path: Path) -> set[str]:
    return {
        slug(line.lstrip("#"))
        for _, line, is_code in lines_of(path.read_text())
        if line.startswith("#") and not is_code
    }


def test_links_lead_somewhere() -> None:
    broken = []
    for path in pages():
        text = re.sub(r"`[^`]*`", "", prose(path))
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if "://" in target:
                continue
            name, _, anchor = target.partition("#")
            file = (path.parent / name).resolve() if name else path
            if not file.exists():
                broken.append(f"{path.relative_to(ROOT)}: {target}")
            elif anchor and file.suffix == ".md" and anchor not in anchors(file):
                broken.append(f"{path.relative_to(ROOT)}: {target}: no such heading")
    assert not broken, "\n".join(broken)


def test_every_page_is_reached_from_the_readme() -> None:
    known, left = set(), [ROOT / "README.md"]
    while left:
        path = left.pop()
        if path in known or path.suffix != ".md" or not path.is_file():
            continue
        known.add(path)
        for target in re.findall(r"\]\(([^)\s#]+)", prose(path)):
            left.append((path.parent / target).resolve())
    missing = {path for path in pages() if ROOT / "docs" in path.parents} - known
    assert not missing


def test_files_that_pages_name_exist() -> None:
    named = re.compile(r"`((?:[\w-]+/)+[\w.-]+\.(?:py|md|yaml|json|j2|html))\b")
    ours = {path.name for root in ROOTS for path in root.iterdir() if path.is_dir()}
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in pages(reports=False)
        if path.name != "CHANGELOG.md"
        for name in named.findall(prose(path))
        if name.split("/")[0] in ours - {"runs", "reports"}
        and "NAME" not in name
        and "some_name" not in name
        and not any((root / name).exists() for root in ROOTS)
    ]
    assert not missing, "\n".join(missing)


def test_pages_that_code_names_exist() -> None:
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in tracked()
        if path.suffix in TEXT - {".md"} or path.name == "Makefile"
        for name in re.findall(r"\bdocs/[\w/-]+\.md", path.read_text())
        if not (ROOT / name).exists()
    ]
    assert not missing, "\n".join(missing)


# The first minute


def test_the_first_screen_says_what_it_is_what_it_saves_and_how_to_serve() -> None:
    head = "\n".join((ROOT / "README.md").read_text().splitlines()[:60])
    order = ["plugin for stock vLLM", "## What it saves", "pip install", "rlkv serve ", "split("]
    places = [head.find(text) for text in order]
    assert -1 not in places, dict(zip(order, places, strict=True))
    assert places == sorted(places)
    assert "reports/" in head


def test_no_page_asks_for_a_class_path() -> None:
    """Of the package; `package.module:function` of a user's reward is another thing."""
    asked = [
        f"{path.relative_to(ROOT)}: {found}"
        for path in pages(reports=False)
        if ROOT / "docs" / "developer" not in path.parents and path.name != "features.md"
        for found in re.findall(r"rlkv_vllm(?:\.\w+)+\.[A-Z]\w+", path.read_text())
    ]
    assert not asked


# Commands


def commands() -> list[tuple[str, str]]:
    """Every `rlkv ...` of README, docs and deploy: code blocks and code spans."""
    found = []
    for path in pages(reports=False):
        text = path.read_text()
        code = "\n".join(line for _, line, is_code in lines_of(text) if is_code)
        code = re.sub(r"(?m)\s+#.*$", "", code).replace("\\\n", " ")
        code = re.sub(r"(?m)\n\s+\[", " [", code)  # the second line of a synopsis
        spans = re.findall(r"`([^`\n]+)`", prose(path))
        for line in [*code.splitlines(), *spans]:
            match = re.search(r"(?:^|&& |\|\d\"? |=\S+ |-m )\s*(rlkv(?:_vllm)? .*)", line)
            if match and not re.match(r"rlkv \d", match[1]):
                found.append((str(path.relative_to(ROOT)), match[1]))
    return found


@cache
def serve_options() -> frozenset[str]:
    from rlkv_vllm.serving import arguments

    parser = arguments._server_parser()
    return frozenset(name for action in parser._actions for name in action.option_strings)


def problem_of(command: str) -> str | None:
    """What is wrong with a command: no such command, no such option."""
    words = shlex.split(re.sub(r"[\[\]|]", " ", command.split(" && ")[0]))[1:]
    node: Any = typer.main.get_command(app)
    while hasattr(node, "commands"):
        if not words or words[0].startswith("-") or words[0] == "...":
            return None
        name = words.pop(0).rstrip(",")
        if name not in node.commands:
            return f"no command {name}"
        node = node.commands[name]
    known = {option for one in node.params for option in (*one.opts, *one.secondary_opts)}
    if node.name == "serve":
        known |= serve_options()
    given = [word.partition("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)]
    wrong = [option for option in given if option not in known | {"--help"}]
    if wrong:
        return f"no option {', '.join(wrong)}"
    if node.name == "bench" and "--cases" in words:
        cases = words[words.index("--cases") + 1].split(",")
        if wrong := [case for case in cases if case not in {*CASES, "LIST"}]:
            return f"no case {', '.join(wrong)}"
    return None


def test_every_command_of_the_pages_exists() -> None:
    pytest.importorskip("vllm")
    found = commands()
    assert len(found) > 60
    wrong = {(*one, problem) for one in found if (problem := problem_of(one[1]))}
    assert not wrong, "\n".join(": ".join(one) for one in sorted(wrong))

"""Every chain of thought against an independent interpreter of its prompt."""

import random
import re
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkv_vllm.tasks.puzzles import (
    FAMILIES,
    LONG_FAMILIES,
    ReasonedProblem,
    example_question,
    make_problem,
    make_problems,
    vocabulary,
)
from tests.support import ROOT

Thought = tuple[list[str], str]


def think_chain(words: list[str]) -> Thought:
    facts = {words[i][:-1]: words[i + 1 : i + 3] for i in range(1, len(words) - 2, 3)}
    assert words[0] == "chain"
    assert words[-2] == "find"

    def down(name: str) -> list[str]:
        source, offset = facts[name]
        return [f"{name}=", source, offset] + (down(source) if source != "start" else [])

    def up(name: str) -> tuple[list[str], int]:
        source, offset = facts[name]
        said, value = up(source) if source != "start" else ([], 0)
        value = (value + int(offset)) % 10
        return [*said, f"{name}:", offset, str(value)], value

    said, value = up(words[-1])
    return down(words[-1]) + said, str(value)


def think_hops(words: list[str]) -> Thought:
    facts = dict(zip(words[1:-2:2], words[2:-2:2], strict=True))
    assert (words[0], words[-2]) == ("hops", "from")
    here, said, weights = words[-1], [], []
    while here != "end":
        weights.append(int(facts[f"{here}$"]))
        said += [f"{here}$", facts[f"{here}$"], str(sum(weights) % 10)]
        said += [f"{here}>", facts[f"{here}>"]]
        here = facts[f"{here}>"]
    return said, str(sum(weights) % 10)


def think_program(words: list[str]) -> Thought:
    assert (words[0], words[-2]) == ("program", "run")
    registers: dict[str, int] = {}
    code: dict[int, list[str]] = {}
    body = words[1:-2]
    for i, word in enumerate(body):
        if word.endswith("="):
            registers[word[:-1]] = int(body[i + 1])
        elif word.startswith("L"):
            code[int(word[1:])] = body[i + 1 : i + (2 if body[i + 1] == "halt" else 3)]
    label, said, result = int(words[-1][1:]), [], -1
    while code[label] != ["halt"]:
        left, right = code[label]
        result = (registers[left] + registers[right]) % 10
        said += [f"L{label}", left, str(registers[left]), right, str(registers[right])]
        said += [f"v{label}=", str(result)]
        registers[f"v{label}"] = result
        label += 1
    return [*said, f"L{label}", "halt"], str(result)


def think_ledger(words: list[str]) -> Thought:
    facts = dict(zip(words[1:-2:2], words[2:-2:2], strict=True))
    assert (words[0], *words[-2:]) == ("ledger", "total", "1.")
    number, total, said = 1, 0, []
    while (good := facts[f"{number}."]) != "done":
        total += int(facts[f"{good}$"])
        said += [f"{number}.", good, f"{good}$", facts[f"{good}$"], str(total % 10)]
        number += 1
    return [*said, f"{number}.", "done"], str(total % 10)


def think_audit(words: list[str]) -> Thought:
    facts, sections = parse_audit(words)
    said, total = [], 0
    for key, start, _, first in sections:
        walk, here, head = [key[0]], start, total
        for label in labels_down_from(first):
            if label != first:
                walk += [f"{here}>", facts[f"{here}>"]]
                here = facts[f"{here}>"]
            total = (total + int(facts[f"{here}$"])) % 10
            walk += [label, f"{here}$", facts[f"{here}$"], str(total)]
        round_ = [str(head), key, start, *walk, f"{key[0]}:", str(total)]
        said += [*round_, "start", *round_, "done"]
    return said, str(total)


def parse_audit(words: list[str]) -> tuple[dict[str, str], list[list[str]]]:
    split = words.index("from")
    assert words[0] == "audit"
    facts = dict(zip(words[1:split:2], words[2:split:2], strict=True))
    tail = words[split + 1 :]
    return facts, [tail[i : i + 4] for i in range(0, len(tail), 4)]


def labels_down_from(first: str) -> list[str]:
    number = int(re.sub(r"\D", "", first))
    return [first.replace(str(number), str(n)) for n in range(number, 0, -1)]


def surprises_of_audit(problem: ReasonedProblem) -> list[int]:
    """Places of the completion where something else follows from prompt and words before."""
    facts, sections = parse_audit(problem.prompt.split())
    words = problem.completion.split()
    found: list[int] = []
    place = 1

    def take(expected: str) -> str:
        nonlocal place
        if words[place] != expected:
            found.append(place)
        place += 1
        return words[place - 1]

    total = "0"
    for key, start, _, first in sections:
        ends: list[str] = []
        while len(ends) == len(set(ends)):
            value = take(total)
            take(key)
            here = take(start)
            take(key[0])
            for label in labels_down_from(first):
                if label != first:
                    take(f"{here}>")
                    here = take(facts[f"{here}>"])
                take(label)
                take(f"{here}$")
                weight = take(facts[f"{here}$"])
                value = take(str((int(value) + int(weight)) % 10))
            take(f"{key[0]}:")
            ends.append(take(value))
            take("start" if len(ends) == len(set(ends)) else "done")
        total = ends[-1]
    for word in ("</think>", "answer", total):
        take(word)
    assert place == len(words)
    return found


INTERPRETERS: dict[str, Callable[[list[str]], Thought]] = {
    "chain": think_chain,
    "hops": think_hops,
    "program": think_program,
    "ledger": think_ledger,
    "audit": think_audit,
}
WORDS = frozenset(vocabulary())


@given(
    family=st.sampled_from([*FAMILIES, *LONG_FAMILIES]),
    seed=st.integers(0, 2**32),
    scale=st.floats(0.01, 1.0),
)
@settings(max_examples=300, deadline=None)
def test_the_chain_of_thought_follows_from_the_prompt(family: str, seed: int, scale: float) -> None:
    problem = make_problem(family, random.Random(seed), scale)
    thought, answer = INTERPRETERS[family](problem.prompt.split())
    assert problem.thought == " ".join(thought)
    assert problem.answer == answer
    assert problem.completion == f"<think> {problem.thought} </think> answer {answer}"
    known = WORDS if family in FAMILIES else frozenset(vocabulary(family))
    assert known.issuperset(f"{problem.prompt} {problem.completion}".split())
    assert not problem.injected


@given(seed=st.integers(0, 2**32), scale=st.floats(0.01, 1.0))
@settings(max_examples=200, deadline=None)
def test_audits_go_on_from_their_faults_and_recover(seed: int, scale: float) -> None:
    problem = make_problem("audit", random.Random(seed), scale, with_faults=True)
    assert surprises_of_audit(problem) == list(problem.injected)
    assert think_audit(problem.prompt.split())[1] == problem.answer
    assert len(problem.completion.split()) < 1900  # prompts have 110, the model has 2048 positions


def test_most_training_audits_have_faults_and_no_other_family_has() -> None:
    rng = random.Random(0)
    audits = [make_problem("audit", rng, with_faults=True) for _ in range(50)]
    assert sum(bool(problem.injected) for problem in audits) > 40
    kinds = {problem.completion.split()[i - 1][-1] for problem in audits for i in problem.injected}
    assert kinds > set("=>$")  # start, link, weight; sums follow a weight
    for family in FAMILIES:
        assert make_problem(family, random.Random(1), with_faults=True) == make_problem(
            family, random.Random(1)
        )


def test_audits_are_long() -> None:
    lengths = [len(problem.completion.split()) for problem in make_problems("audit", 100, seed=0)]
    assert 800 < sum(lengths) / len(lengths) < 900
    assert max(lengths) < 1100


def test_no_word_stands_twice_in_the_vocabulary() -> None:
    assert len(list(vocabulary())) == len(WORDS)
    assert list(vocabulary("hops")) == list(vocabulary())
    assert list(vocabulary("audit")) == [*vocabulary(), "audit"]


@pytest.mark.parametrize("family", [*FAMILIES, *LONG_FAMILIES])
def test_facts_are_named_once_and_lie_beyond_the_window(family: str) -> None:
    for problem in make_problems(family, 20, seed=5):
        words = problem.prompt.split()
        words = words[: words.index("from")] if family == "audit" else words[:-2]
        keys = [word for word in words if word[0] == "L" or word[-1] in "=>$."]
        assert len(keys) == len(set(keys))
        assert len(words) > 2 * 16
        assert len(problem.completion.split()) > 4 * 16


def test_problems_depend_on_their_arguments_alone() -> None:
    assert make_problems(None, 8, 3) == make_problems(None, 8, 3)
    assert make_problems(None, 8, 3)[:4] == make_problems(None, 4, 3)
    assert not set(make_problems(None, 8, 3)) & set(make_problems(None, 8, 4))


def test_the_mix_takes_the_families_in_turn() -> None:
    first = [problem.prompt.split()[0] for problem in make_problems(None, 8, 0)]
    assert first == [*FAMILIES, *FAMILIES]


def test_the_example_question_is_short_and_fixed() -> None:
    assert example_question() == example_question()
    assert 10 < len(example_question().split()) < 40


def test_the_examples_of_the_documentation_are_right() -> None:
    text = (ROOT / "docs" / "developer" / "testbed.md").read_text()
    examples = re.findall(r"```\n(.*)\n(<think> .*)\n```", text)
    assert [prompt.split()[0] for prompt, _ in examples] == [*FAMILIES, *LONG_FAMILIES]
    for prompt, completion in examples:
        thought, answer = INTERPRETERS[prompt.split()[0]](prompt.split())
        assert completion == f"<think> {' '.join(thought)} </think> answer {answer}"

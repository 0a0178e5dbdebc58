"""Every chain of thought against an independent interpreter of its prompt."""

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkv_vllm.testbed import example_question
from rlkv_vllm.testbed.problems import FAMILIES, make_problem, make_problems, vocabulary

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


INTERPRETERS: dict[str, Callable[[list[str]], Thought]] = {
    "chain": think_chain,
    "hops": think_hops,
    "program": think_program,
    "ledger": think_ledger,
}
WORDS = frozenset(vocabulary())


@given(
    family=st.sampled_from(FAMILIES),
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
    assert WORDS.issuperset(f"{problem.prompt} {problem.completion}".split())


def test_no_word_stands_twice_in_the_vocabulary() -> None:
    assert len(list(vocabulary())) == len(WORDS)


@pytest.mark.parametrize("family", FAMILIES)
def test_facts_are_named_once_and_lie_beyond_the_window(family: str) -> None:
    for problem in make_problems(family, 20, seed=5):
        words = problem.prompt.split()[:-2]
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
    text = (Path(__file__).parents[2] / "docs" / "testbed.md").read_text()
    examples = re.findall(r"```\n(.*)\n(<think> .*)\n```", text)
    assert [prompt.split()[0] for prompt, _ in examples] == list(FAMILIES)
    for prompt, completion in examples:
        thought, answer = INTERPRETERS[prompt.split()[0]](prompt.split())
        assert completion == f"<think> {' '.join(thought)} </think> answer {answer}"

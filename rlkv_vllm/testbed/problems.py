"""Four families of reasoning problems, with their chains of thought.

Every step of a chain of thought looks up a fact that was written far back, by one token
that has no other use: `c=`, `c:`, `zumpus>`, `zumpus$`, `L7`, `v3=`, `12.`, `apple$`. Values are
digits; arithmetic is modulo 10. Words are separated by single spaces and one word is one token.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

MODULUS = 10

THINK, END_THINK, ANSWER = "<think>", "</think>", "answer"

VARIABLES = tuple("abcdefghijklmnopqrstuvwxyz")
# fmt: off
CREATURES = (
    "bumpus", "dumpus", "fumpus", "gumpus", "humpus", "jumpus", "kumpus", "lumpus", "mumpus",
    "numpus", "pumpus", "rumpus", "sumpus", "tumpus", "vumpus", "wumpus", "grimpus", "lempus",
    "lorpus", "shumpus", "sterpus", "yimpus", "zhorpus", "zumpus",
)
GOODS = (
    "apple", "bread", "cheese", "date", "egg", "fig", "grape", "honey", "jam", "kiwi", "lemon",
    "mango", "nut", "olive", "pear", "rice",
)
# fmt: on
MAX_LINES = 24  # labels of a program, lines of a ledger

#: The number of steps at scale 1.
CHAIN_STEPS, HOPS_STEPS, PROGRAM_STEPS, LEDGER_STEPS = 24, 20, 18, 22
PROGRAM_INPUTS = 4


@dataclass(frozen=True)
class ReasonedProblem:
    """A problem with the chain of thought that solves it.

    Attributes:
        prompt: what the user says.
        thought: the words between `<think>` and `</think>`.
        answer: one digit.
    """

    prompt: str
    thought: str
    answer: str

    @property
    def completion(self) -> str:
        """What the model is to say, without the end token."""
        return f"{THINK} {self.thought} {END_THINK} {ANSWER} {self.answer}"


def _chain(rng: random.Random, steps: int) -> ReasonedProblem:
    """Resolve a variable down to its start, then compute back up."""
    decoys = min(len(VARIABLES) - steps, 1 + steps // 6)
    names = rng.sample(VARIABLES, steps + decoys)
    # The decoys define each other in a circle: with a second start, the offset that follows
    # "start" would be ambiguous to a model that looks it up by that word.
    sources = ["start", *names[: steps - 1], names[-1], *names[steps:-1]]
    facts = {
        name: (source, rng.randrange(MODULUS)) for name, source in zip(names, sources, strict=True)
    }
    chain = names[:steps]
    words = ["chain"]
    for name in rng.sample(names, len(names)):
        source, offset = facts[name]
        words += [f"{name}=", source, f"+{offset}"]
    words += ["find", chain[-1]]
    thought: list[str] = []
    for name in reversed(chain):
        source, offset = facts[name]
        thought += [f"{name}=", source, f"+{offset}"]
    value = 0
    for name in chain:
        offset = facts[name][1]
        value = (value + offset) % MODULUS
        thought += [f"{name}:", f"+{offset}", str(value)]
    return ReasonedProblem(" ".join(words), " ".join(thought), str(value))


def _hops(rng: random.Random, steps: int) -> ReasonedProblem:
    """Follow links to the end and add up the weights on the way."""
    decoys = min(len(CREATURES) - steps, 1 + steps // 6)
    names = rng.sample(CREATURES, steps + decoys)
    weights = {name: rng.randrange(MODULUS) for name in names}
    facts = []
    for i, name in enumerate(names):
        is_last = i in (steps - 1, len(names) - 1)
        facts.append([f"{name}>", "end" if is_last else names[i + 1]])
        facts.append([f"{name}$", f"+{weights[name]}"])
    rng.shuffle(facts)
    words = ["hops", *(word for fact in facts for word in fact), "from", names[0]]
    thought: list[str] = []
    value = 0
    for i, name in enumerate(names[:steps]):
        value = (value + weights[name]) % MODULUS
        following = "end" if i == steps - 1 else names[i + 1]
        thought += [f"{name}$", f"+{weights[name]}", str(value), f"{name}>", following]
    return ReasonedProblem(" ".join(words), " ".join(thought), str(value))


def _program(rng: random.Random, steps: int) -> ReasonedProblem:
    """Execute shuffled instructions in the order of their labels.

    Instruction `Lk vi vj` sets `vk` to `vi + vj`; the first few `v` are given.
    """
    inputs = min(PROGRAM_INPUTS, 1 + steps)
    values = [rng.randrange(MODULUS) for _ in range(inputs)]
    facts = [[f"v{i + 1}=", str(value)] for i, value in enumerate(values)]
    thought: list[str] = []
    last = inputs + steps
    for label in range(inputs + 1, last + 1):
        left, right = rng.sample(range(1, label), 2)
        values.append((values[left - 1] + values[right - 1]) % MODULUS)
        facts.append([f"L{label}", f"v{left}", f"v{right}"])
        thought += [f"L{label}", f"v{left}", str(values[left - 1])]
        thought += [f"v{right}", str(values[right - 1]), f"v{label}=", str(values[-1])]
    facts.append([f"L{last + 1}", "halt"])
    thought += [f"L{last + 1}", "halt"]
    rng.shuffle(facts)
    words = ["program", *(word for fact in facts for word in fact), "run", f"L{inputs + 1}"]
    return ReasonedProblem(" ".join(words), " ".join(thought), str(values[-1]))


def _ledger(rng: random.Random, steps: int) -> ReasonedProblem:
    """Add up the prices of a shuffled numbered list."""
    goods = rng.sample(GOODS, min(len(GOODS), 2 + steps // 2))
    prices = {good: rng.randrange(MODULUS) for good in goods}
    lines = [rng.choice(goods) for _ in range(steps)]
    facts = [[f"{number}.", good] for number, good in enumerate([*lines, "done"], start=1)]
    facts += [[f"{good}$", f"+{price}"] for good, price in prices.items()]
    rng.shuffle(facts)
    words = ["ledger", *(word for fact in facts for word in fact), "total", "1."]
    thought: list[str] = []
    value = 0
    for number, good in enumerate(lines, start=1):
        value = (value + prices[good]) % MODULUS
        thought += [f"{number}.", good, f"{good}$", f"+{prices[good]}", str(value)]
    thought += [f"{steps + 1}.", "done"]
    return ReasonedProblem(" ".join(words), " ".join(thought), str(value))


_FAMILIES: dict[str, tuple[Callable[[random.Random, int], ReasonedProblem], int]] = {
    "chain": (_chain, CHAIN_STEPS),
    "hops": (_hops, HOPS_STEPS),
    "program": (_program, PROGRAM_STEPS),
    "ledger": (_ledger, LEDGER_STEPS),
}

#: Names of the task families.
FAMILIES = tuple(_FAMILIES)


def make_problem(family: str, rng: random.Random, scale: float = 1.0) -> ReasonedProblem:
    """One random problem.

    Args:
        family: one of `FAMILIES`.
        rng: where the randomness comes from.
        scale: size in (0, 1]; 1 is the full size, of which the last fifth varies.
    """
    make, full = _FAMILIES[family]
    longest = max(1, round(full * scale))
    return make(rng, rng.randint(max(1, round(longest * 0.8)), longest))


def make_problems(
    family: str | None, n: int, seed: int, scale: float = 1.0
) -> list[ReasonedProblem]:
    """`n` random problems, the same ones for the same arguments.

    Args:
        family: one of `FAMILIES`, or None for all of them in turn.
        n: number of problems.
        seed: any integer; training draws from streams that no seed here reaches.
        scale: size in (0, 1].
    """
    rng = random.Random(f"fresh-{family}-{seed}")
    return [make_problem(family or FAMILIES[i % len(FAMILIES)], rng, scale) for i in range(n)]


def vocabulary() -> Iterator[str]:
    """Every word that a problem or a completion may hold, in a fixed order."""
    yield from (THINK, END_THINK, ANSWER)
    yield from FAMILIES
    yield from ("find", "from", "run", "total", "start", "end", "halt", "done")
    yield from (str(digit) for digit in range(MODULUS))
    yield from (f"+{digit}" for digit in range(MODULUS))
    for pattern in ("{}", "{}=", "{}:"):
        yield from (pattern.format(name) for name in VARIABLES)
    for pattern in ("{}", "{}>", "{}$"):
        yield from (pattern.format(name) for name in CREATURES)
    for pattern in ("L{}", "v{}", "v{}=", "{}."):
        yield from (pattern.format(number) for number in range(1, MAX_LINES + 1))
    for pattern in ("{}", "{}$"):
        yield from (pattern.format(name) for name in GOODS)

"""Five families of reasoning problems, with their chains of thought.

Every step of a chain of thought looks up a fact that was written much earlier, by a word used for
nothing else: `c=`, `c:`, `zumpus>`, `zumpus$`, `L7`, `v3=`, `12.`, `apple$`. Words are tokens,
separated by single spaces. Values are digits; arithmetic is modulo 10.

The fifth family, `audit`, needs a model of its own: its chains of thought are five times as long
and check themselves, so that a model can recover from its errors.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

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

PROGRAM_INPUTS = 4

#: Sections of an audit in order: letter and label of a step. Labels differ by section, so that the
#: last few words tell the model where it is; they count down, so that no end has to be looked up.
AUDIT_SECTIONS = (("d", "{}."), ("c", "L{}"), ("b", "v{}"), ("a", "v{}="))
_FAULTY_SHARE = 0.25  # of the walks in training texts
_MOST_FAULTY_OF_SECTION, _MOST_FAULTY = 2, 5  # walks: bounds the length of training texts


@dataclass(frozen=True)
class ReasonedProblem:
    """A problem with the chain of thought that solves it.

    `thought` is between `<think>` and `</think>`, `answer` one digit. `injected` are positions of
    wrong words in `completion`, in training texts only: errors to recover from, which a model must
    not be trained to make; `pivots` those of rare words that decide the length of `thought`.
    """

    prompt: str
    thought: str
    answer: str
    injected: tuple[int, ...] = ()
    pivots: tuple[int, ...] = ()

    @property
    def completion(self) -> str:
        """What the model should say, without the end token."""
        return f"{THINK} {self.thought} {END_THINK} {ANSWER} {self.answer}"


def _chain(rng: random.Random, steps: int) -> ReasonedProblem:
    """Resolve a variable down to its start, then compute it back up."""
    decoys = min(len(VARIABLES) - steps, 1 + steps // 6)
    names = rng.sample(VARIABLES, steps + decoys)
    # The decoys define each other in a circle: a second start would make the offset after
    # "start" ambiguous.
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


def _audit(rng: random.Random, steps: int, *, with_faults: bool = False) -> ReasonedProblem:
    """Walk from four starts, from each until a total is confirmed, and add up all weights.

    The links form one circle. `3 c= zumpus c L9` begins a walk of 9 steps from `zumpus` with a
    total of 3 so far; `c: 5` ends it. `start` repeats the walk of the section. `done` closes the
    section when two of its walks ended with the same total; the next section begins with that
    total. A wrong word makes a walk miss its total, and more walks correct it.
    """
    names = rng.sample(CREATURES, min(len(CREATURES), 2 + steps + steps // 3))
    links = dict(zip(names, [*names[1:], names[0]], strict=True))
    weights = {name: rng.randrange(MODULUS) for name in names}
    facts = [[f"{name}>", links[name]] for name in names]
    facts += [[f"{name}$", f"+{weights[name]}"] for name in names]
    rng.shuffle(facts)
    words = ["audit", *(word for fact in facts for word in fact), "from"]
    thought: list[str] = []
    injected: list[int] = []
    pivots: list[int] = []
    total, all_faulty = 0, 0
    for letter, pattern in AUDIT_SECTIONS:
        start = rng.choice(names)
        length = rng.randint(max(1, round(0.7 * steps)), steps)
        labels = [pattern.format(number) for number in range(length, 0, -1)]
        words += [f"{letter}=", start, letter, labels[0]]
        right = _walk(rng, links, weights, start, letter, labels, total, 0)
        seen: list[int] = []
        faulty = 0
        while True:
            said, wrong, result = right
            may_fail = faulty < _MOST_FAULTY_OF_SECTION and all_faulty < _MOST_FAULTY
            if with_faults and may_fail and rng.random() < _FAULTY_SHARE:
                faulty, all_faulty = faulty + 1, all_faulty + 1
                # The same wrong total twice would close the section with a wrong result.
                while result in (right[2], *seen):
                    n_faults = rng.choice((1, 1, 2))
                    said, wrong, result = _walk(
                        rng, links, weights, start, letter, labels, total, n_faults
                    )
            # In the completion, `<think>` and two words of the section come before a walk.
            injected += [len(thought) + 3 + place for place in wrong]
            pivots.append(len(thought) + 5)  # the number of steps
            thought += [str(total), f"{letter}=", *said, f"{letter}:", str(result)]
            pivots.append(len(thought) + 1)  # `start` or `done`
            if result in seen:
                break
            seen.append(result)
            thought.append("start")
        thought.append("done")
        total = result
    return ReasonedProblem(
        " ".join(words), " ".join(thought), str(total), tuple(injected), tuple(pivots)
    )


def _walk(
    rng: random.Random,
    links: dict[str, str],
    weights: dict[str, int],
    start: str,
    letter: str,
    labels: list[str],
    value: int,
    n_faults: int,
) -> tuple[list[str], list[int], int]:
    """The words of one walk, the positions of the wrong ones, and its total.

    `value` is the total before. After a wrong word the walk continues with that word.
    """
    words: list[str] = []
    wrong: list[int] = []
    faults = set(rng.sample(range(3 * len(labels)), min(n_faults, 3 * len(labels))))

    def say(slot: int, right: str, choices: list[str]) -> str:
        word = right
        if slot in faults:
            wrong.append(len(words))
            word = rng.choice([choice for choice in choices if choice != right])
        words.append(word)
        return word

    names, digits = list(links), [str(digit) for digit in range(MODULUS)]
    name = start
    for step, label in enumerate(labels):
        if step > 0:
            words.append(f"{name}>")
            name = links[name]
        name = say(3 * step, name, names)
        words += [label, f"{name}$"] if step > 0 else [letter, label, f"{name}$"]
        weight = say(3 * step + 1, f"+{weights[name]}", [f"+{digit}" for digit in digits])
        value = int(say(3 * step + 2, str((value + int(weight)) % MODULUS), digits))
    return words, wrong, value


# How a problem is made, and its number of steps at scale 1.
_FAMILIES: dict[str, tuple[Callable[[random.Random, int], ReasonedProblem], int]] = {
    "chain": (_chain, 24),
    "hops": (_hops, 20),
    "program": (_program, 18),
    "ledger": (_ledger, 22),
    "audit": (_audit, 22),
}

#: The task families of the embedded model.
FAMILIES = ("chain", "hops", "program", "ledger")
#: Task families with long chains of thought, each for a model of its own.
LONG_FAMILIES = ("audit",)


def make_problem(
    family: str, rng: random.Random, scale: float = 1.0, *, with_faults: bool = False
) -> ReasonedProblem:
    """One random problem of one of `FAMILIES` or `LONG_FAMILIES`.

    `scale` is the greatest size in (0, 1]; sizes vary by a fifth. `with_faults` puts errors to
    recover from into an audit, as in training texts.
    """
    make, full = _FAMILIES[family]
    if with_faults and make is _audit:
        make = partial(_audit, with_faults=True)
    longest = max(1, round(full * scale))
    return make(rng, rng.randint(max(1, round(longest * 0.8)), longest))


def make_problems(
    family: str | None, n: int, seed: int, scale: float = 1.0
) -> list[ReasonedProblem]:
    """`n` random problems, the same for the same arguments; training never uses them.

    `family` is one of `FAMILIES` or `LONG_FAMILIES`, or None for all of `FAMILIES` in turn; `scale`
    is as in `make_problem`.
    """
    rng = random.Random(f"fresh-{family}-{seed}")
    return [make_problem(family or FAMILIES[i % len(FAMILIES)], rng, scale) for i in range(n)]


def vocabulary(family: str | None = None) -> Iterator[str]:
    """Every word that a problem or a completion may hold, in a fixed order.

    `family` is a long family to include; None is the vocabulary of the embedded model.
    """
    yield from (THINK, END_THINK, ANSWER, *FAMILIES)
    yield from ("find", "from", "run", "total", "start", "end", "halt", "done")
    for patterns, names in (
        (("{}", "+{}"), range(MODULUS)),
        (("{}", "{}=", "{}:"), VARIABLES),
        (("{}", "{}>", "{}$"), CREATURES),
        (("L{}", "v{}", "v{}=", "{}."), range(1, MAX_LINES + 1)),
        (("{}", "{}$"), GOODS),
    ):
        yield from (pattern.format(name) for pattern in patterns for name in names)
    if family in LONG_FAMILIES:
        yield family


def example_question() -> str:
    """A short problem for a first request, always the same."""
    return make_problems("hops", 1, seed=0, scale=0.3)[0].prompt

"""What a comparison compares."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.evaluation.splits import FULL
from rlkv_vllm.files import one_line
from rlkv_vllm.options import override
from rlkv_vllm.scorers import METHODS

#: What follows the label of the method whose profiles are refined.
REFINED = "+refine"

_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]*")
_MAX_SEED = 2**31 - 2


@dataclass(frozen=True)
class Method:
    """One way to find heads: exactly one of `scorer`, `start` and `pattern` is set.

    Attributes:
        label: its name in the table, and of its files.
        scorer: that of `rlkv score`.
        start: label of the method whose profiles `rlkv refine` starts from.
        pattern: path of profiles that exist, with `{model}` and `{seed}` in it.
        settings: those of the scorer, or options of the refinement, in place of the defaults.
    """

    label: str
    scorer: str | None = None
    start: str | None = None
    pattern: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def seeds(self, seeds: Sequence[int]) -> list[int | None]:
        """The seeds that it has a profile of; None where one profile serves for all."""
        one_file = self.pattern is not None and "{seed}" not in self.pattern
        return [None] if one_file else list(seeds)

    def path(self, model: str, seed: int | None) -> Path:
        """The file that the pattern names."""
        assert self.pattern is not None
        return Path(self.pattern.replace("{model}", model).replace("{seed}", str(seed)))


@dataclass(frozen=True)
class CompareConfig:
    """Options of `rlkv compare`, whose help describes them.

    `models` are names as elsewhere by label; `sampling` are the fields of `Sampling` that were
    given, the others are those that each model asks for.
    """

    models: Mapping[str, str]
    methods: Mapping[str, Method]
    reference: str
    output: Path
    seeds: Sequence[int] = (0, 1, 2)
    sparsities: Sequence[float] = (0.4, 0.5)
    task: str = "embedded"
    n: int = 1000
    problem_seed: int = 1000
    samples: int = 1
    sampling: Mapping[str, Any] = field(default_factory=dict)
    max_new_tokens: int = 512
    score_n: int = 64
    batch_size: int = 64
    sink: int | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        if self.reference not in self.methods:
            raise RlkvError(
                f"--reference {one_line(self.reference)}: is not compared: choose from "
                f"{', '.join(self.methods)}"
            )
        if self.problem_seed in self.seeds:
            raise RlkvError(
                f"--problem-seed {self.problem_seed}: is one of --seeds, so methods have seen "
                "these problems: give another one"
            )
        for share in self.sparsities:
            if not 0 < share <= 1:
                raise RlkvError(
                    f"--sparsities {share:g}: give shares above 0 and up to 1; the full cache is "
                    "always measured"
                )


def read_models(names: Sequence[str]) -> dict[str, str]:
    """Models by label, of MODEL and LABEL=MODEL.

    Raises:
        RlkvError: a label is no name, or two models have the same.
    """
    models: dict[str, str] = {}
    for given in names:
        label, equals, model = given.partition("=")
        if not equals:
            model = given
            label = re.sub(r"[^A-Za-z0-9_+-]", "-", Path(given).name).lstrip("_+-")
        _check_label("MODEL", label, given)
        if label in models:
            raise RlkvError(
                f"MODEL {one_line(given)}: two models are called {label}: give LABEL=MODEL"
            )
        models[label] = model
    return models


def read_methods(
    names: str, patterns: Sequence[str] = (), changes: Sequence[str] = ()
) -> dict[str, Method]:
    """Methods by label, in order.

    Args:
        names: [LABEL=]SCORER and LABEL+refine, separated by commas.
        patterns: LABEL=PATTERN of profiles that exist.
        changes: LABEL.key=value, settings of methods.

    Raises:
        RlkvError: an unknown method, a label that is no name or that comes twice, a setting of no
            method, or a refinement of a method that is not compared.
    """
    methods: dict[str, Method] = {}

    def add(flag: str, given: str, method: Method) -> None:
        _check_label(flag, method.label, given)
        if method.label in (*methods, FULL):
            raise RlkvError(
                f"{flag} {one_line(given)}: {method.label} is there already: choose another label"
            )
        methods[method.label] = method

    for given in filter(None, (name.strip() for name in names.split(","))):
        label, equals, name = given.partition("=")
        name = name if equals else given
        if name.endswith(REFINED):
            add("--methods", given, Method(label, start=name.removesuffix(REFINED)))
        elif name in METHODS:
            add("--methods", given, Method(label, scorer=name))
        else:
            raise RlkvError(
                f"--methods {one_line(given)}: no such method: choose from {', '.join(METHODS)}, "
                f"and NAME{REFINED} of a method that is compared"
            )
    for given in patterns:
        label, equals, pattern = given.partition("=")
        if not equals or not pattern:
            raise RlkvError(
                f"--profile {one_line(given)}: give LABEL=PATTERN, e.g. "
                "mine=runs/{model}-s{seed}.json"
            )
        add("--profile", given, Method(label, pattern=pattern))
    if not methods:
        raise RlkvError("--methods: nothing to compare: name methods, or give --profile")
    for method in methods.values():
        if method.start is not None and method.start not in methods:
            raise RlkvError(
                f"--methods {method.label}: {one_line(method.start)} is not compared: add it to "
                "--methods or --profile"
            )
    settings = override({}, changes)
    for label, values in settings.items():
        known = [method.label for method in methods.values() if method.pattern is None]
        if label not in known or not isinstance(values, dict):
            raise RlkvError(
                f"--set {one_line(label)}: give LABEL.key=value, with a label of --methods: "
                f"{', '.join(known) or 'there is none'}"
            )
    return {
        label: Method(label, one.scorer, one.start, one.pattern, settings.get(label, {}))
        for label, one in methods.items()
    }


def read_seeds(text: str) -> list[int]:
    """Different seeds, separated by commas.

    Raises:
        RlkvError: one is no number from 0 to 2^31 - 2, or comes twice.
    """
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = [-1]
    if len({*seeds}) < len(seeds) or not all(0 <= seed <= _MAX_SEED for seed in seeds):
        raise RlkvError(
            f"--seeds {one_line(text)}: give different numbers from 0 to {_MAX_SEED} separated by "
            "commas, e.g. 0,1,2"
        )
    return seeds


def _check_label(flag: str, label: str, given: str) -> None:
    if not _LABEL.fullmatch(label):
        raise RlkvError(
            f"{flag} {one_line(given)}: {one_line(label) or 'nothing'} is no label: use letters, "
            "digits, - and _"
        )

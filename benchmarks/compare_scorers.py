"""Head profiles against each other on fresh problems, by mask, with paired tests.

    python benchmarks/compare_scorers.py embedded rlkv=a.json rlkv=b.json random=c.json \
        --sparsity .4,.5 --n 300 --against rlkv --output base0.json
    python benchmarks/compare_scorers.py --merge base0.json base1.json --against rlkv \
        --output both.json

Several profiles of one label are its seeds. The full cache and all streaming heads are always in
the table. Writes JSON and, beside it, Markdown; OUTPUT.cache.json holds every finished
measurement, so that the same command continues a killed run and profiles that keep the same heads
are measured once. --merge pools the results of several base models.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlkv_vllm.allocation.heads import allocate, read_sparsities
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.evaluation.compare import Outcome, compare, markdown, rank_agreement
from rlkv_vllm.evaluation.measurement import Measurement
from rlkv_vllm.evaluation.splits import FULL, STREAMING, Split
from rlkv_vllm.files import read_json_object, write_bytes_atomic, write_text_atomic
from rlkv_vllm.profile import HeadProfile
from rlkv_vllm.profile.io import check_matches, load_profile

FORMAT = "compare scorers 1"


def parse_args(args: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", help="`embedded`, a model folder, or org/name")
    parser.add_argument("profiles", nargs="*", metavar="LABEL=PROFILE")
    parser.add_argument("--output", type=Path, required=True, help="JSON; .md goes beside it")
    parser.add_argument("--merge", type=Path, nargs="+", help="results of other base models")
    parser.add_argument("--against", metavar="LABEL", help="what the others are tested against")
    parser.add_argument("--sparsity", default=".4,.5", help="separated by commas")
    parser.add_argument("--task", default="embedded")
    parser.add_argument("--n", type=int, default=300, help="problems")
    parser.add_argument("--seed", type=int, default=20270101, help="of the problems")
    parser.add_argument("--sink", type=int, help="instead of the profiles'")
    parser.add_argument("--window", type=int, help="instead of the profiles'")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of PyTorch")
    found = parser.parse_args(args)
    if found.merge and (found.model or found.profiles):
        parser.error("--merge takes no model and no profiles")
    if not found.merge and not (found.model and found.profiles):
        parser.error("give a model and profiles, or --merge")
    return found


def main(args: argparse.Namespace) -> None:
    if args.merge:
        results = [_read_result(path) for path in args.merge]
        keys = ("task", "n", "seed", "max_new_tokens", "sink", "window")
        settings = {key: results[0]["settings"][key] for key in keys}
        for path, result in zip(args.merge, results, strict=True):
            differing = [key for key in keys if result["settings"][key] != settings[key]]
            if differing:
                raise RlkvError(f"{path}: has another {', '.join(differing)} than {args.merge[0]}")
        models = [result["settings"]["model"] for result in results]
        if len(set(models)) < len(models):
            raise RlkvError("--merge: two results are of the same base model: leave one out")
        runs = [run for result in results for run in result["runs"]]
        gates = [row for result in results for row in result["gates"]]
        settings["model"] = models
    else:
        settings, gates, runs = measure(args)
    publish(args, settings, gates, runs)


def measure(
    args: argparse.Namespace,
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """Settings, gates and outcomes of one base model."""
    from rlkv_vllm.answers import Sampling
    from rlkv_vllm.hf.answers import HeadSplit, solve
    from rlkv_vllm.hf.loading import load_model, set_threads
    from rlkv_vllm.tasks import get_task

    sparsities = sorted(set(read_sparsities(args.sparsity, "--sparsity")) - {0.0, 1.0})
    profiles = [_labelled(text) for text in args.profiles]
    _check_seeds(profiles, args)
    spans = {(p.sink, p.window) for _, p in profiles} if None in (args.sink, args.window) else set()
    if len(spans) > 1:
        raise RlkvError(f"the profiles differ in sink and window ({spans}): set both by flag")
    sink = profiles[0][1].sink if args.sink is None else args.sink
    window = profiles[0][1].window if args.window is None else args.window
    set_threads(args.threads)
    model, tokenizer, fingerprint = load_model(args.model)
    for _, profile in profiles:
        check_matches(profile, fingerprint)
    weights = weights_hash(model)
    task = get_task(args.task)
    problems = task.problems(args.n, args.seed)
    settings = {
        "model": weights,
        "model_name": fingerprint.id,
        "task": args.task,
        "n": args.n,
        "seed": args.seed,
        "max_new_tokens": args.max_new_tokens,
        "sink": sink,
        "window": window,
    }
    cache = Cache(args.output.with_suffix(".cache.json"))
    gates: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []

    def add(label: str, run: int, sparsity: float, values: list[list[float]]) -> None:
        heads = allocate(values, sparsity).full
        split = Split(label, sparsity, Path(), sink, window, heads)
        asked = {key: settings[key] for key in ("model", "task", "n", "seed", "max_new_tokens")}
        key = json.dumps(asked | {"split": split.digest}, sort_keys=True)
        found = cache.find(key)
        if found is None:
            started = time.monotonic()
            result = solve(
                model,
                tokenizer,
                task,
                problems,
                split=HeadSplit(heads, sink, window) if sparsity else None,
                sampling=Sampling(max_tokens=args.max_new_tokens, temperature=0),
                batch_size=args.batch_size,
            )
            found = cache.add(
                key,
                Measurement(
                    correct=tuple(result.correct),
                    output_tokens=tuple(len(answer.token_ids) for answer in result.answers),
                    capped=sum(answer.hit_cap for answer in result.answers),
                    seconds=time.monotonic() - started,
                ),
            )
        print(f"{label} {run} at {sparsity:g}: {found.accuracy:.3f}", file=sys.stderr, flush=True)
        runs.append(
            {"base": weights, "label": label, "run": run, "sparsity": sparsity, **_plain(found)}
        )

    anything = profiles[0][1].gates  # baselines do not depend on gates
    add(FULL, 0, 0.0, anything)
    seen: dict[str, int] = {}
    for label, profile in profiles:
        run = seen[label] = seen.get(label, -1) + 1
        gates.append({"base": weights, "label": label, "gates": profile.gates})
        for sparsity in sparsities:
            add(label, run, sparsity, profile.gates)
    add(STREAMING, 0, 1.0, anything)
    return settings, gates, runs


def publish(
    args: argparse.Namespace,
    settings: dict[str, Any],
    gates: list[dict[str, Any]],
    runs: list[dict[str, Any]],
) -> None:
    """Compute the table, print it, write JSON and Markdown."""
    outcomes = [
        Outcome(run["base"], run["label"], run["run"], run["sparsity"], _measurement(run))
        for run in runs
    ]
    rows = compare(outcomes, args.against)
    agreement: dict[str, float | None] = {}
    for label in dict.fromkeys(row["label"] for row in gates):
        # Only gates of the same base model can agree.
        found = [
            rank_agreement([row["gates"] for row in gates if (row["base"], row["label"]) == key])
            for key in dict.fromkeys((row["base"], label) for row in gates)
        ]
        known = [value for value in found if value is not None]
        agreement[label] = sum(known) / len(known) if known else None
    text = markdown(rows, agreement, args.against)
    result = {
        "format": FORMAT,
        "settings": settings,
        "against": args.against,
        "table": [vars(row) for row in rows],
        "rank_agreement": agreement,
        "gates": gates,
        "runs": runs,
    }
    write_bytes_atomic(
        {
            args.output: (json.dumps(result) + "\n").encode(),
            args.output.with_suffix(".md"): text.encode(),
        }
    )
    print(text, end="")


class Cache:
    """Finished measurements by what decides them, on disk after each of them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, Any] = read_json_object(path) if path.exists() else {}

    def find(self, key: str) -> Measurement | None:
        return _measurement(self._entries[key]) if key in self._entries else None

    def add(self, key: str, measurement: Measurement) -> Measurement:
        self._entries[key] = _plain(measurement)
        write_text_atomic(self._path, json.dumps(self._entries, indent=0) + "\n")
        return measurement


def weights_hash(model: Any) -> str:
    """SHA-256 of the names and values of all weights."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode())
        plain = value.detach().contiguous().reshape(-1).cpu()
        digest.update(plain.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _labelled(text: str) -> tuple[str, HeadProfile]:
    label, equals, path = text.partition("=")
    if not (label and equals and path):
        raise RlkvError(f"{text}: give LABEL=PROFILE, e.g. rlkv=runs/rlkv/profile.json")
    if label in (FULL, STREAMING):
        raise RlkvError(f"{text}: {label} is the name of a baseline: choose another label")
    return label, load_profile(path)


def _check_seeds(profiles: Sequence[tuple[str, HeadProfile]], args: argparse.Namespace) -> None:
    """Refuse problems that a profile was made from."""
    for label, profile in profiles:
        if profile.provenance.seed == args.seed and profile.provenance.method != "random":
            raise RlkvError(
                f"--seed {args.seed}: {label} was made with the same seed, perhaps from the same "
                "problems: choose another"
            )


def _plain(measurement: Measurement) -> dict[str, Any]:
    return {
        "correct": "".join("01"[right] for right in measurement.correct),
        "output_tokens": list(measurement.output_tokens),
        "capped": measurement.capped,
        "seconds": round(measurement.seconds, 2),
    }


def _measurement(entry: dict[str, Any]) -> Measurement:
    return Measurement(
        correct=tuple(bit == "1" for bit in entry["correct"]),
        output_tokens=tuple(entry["output_tokens"]),
        capped=entry["capped"],
        seconds=entry["seconds"],
    )


def _read_result(path: Path) -> dict[str, Any]:
    result = read_json_object(path)
    if result.get("format") != FORMAT:
        raise RlkvError(f"{path}: no result of this benchmark: give files written by --output")
    return result


if __name__ == "__main__":
    try:
        main(parse_args())
    except RlkvError as error:
        sys.exit(f"error: {error}")

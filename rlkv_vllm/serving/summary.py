"""The summary after a start: what the split saves, and an example request."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlkv_vllm import models
from rlkv_vllm.tasks import puzzles

if TYPE_CHECKING:
    from rlkv_vllm.engine.report import SplitReport
    from rlkv_vllm.profile.evidence import Within


def summary(reports: Sequence[SplitReport], args: Namespace, within: Within | None = None) -> str:
    """Table of the split cache against a full one, and an example request.

    `within` is why this sparsity, if an accuracy budget chose it.
    """
    fullest = min(reports, key=lambda report: report.requests_at_once)
    workers = "" if len(reports) == 1 else f"; figures of the fullest of {len(reports)} workers"
    rows = [("", "split cache", "full cache"), *fullest.rows()]
    budget = [] if within is None else [f"  sparsity {within.sparsity:g}: {within.describe()}"]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(
        [
            f"the KV cache is split per head, as read back from the engine{workers}",
            *(
                f"  {label:<{widths[0]}}  {split:<{widths[1]}}  {full}".rstrip()
                for label, split, full in rows
            ),
            *budget,
            "  try:",
            *(f"    {line}" for line in _request(args)),
        ]
    )


def served_names(args: Namespace) -> list[str]:
    """Names under which the model is served, the main one first."""
    names = args.served_model_name or [args.model]
    return [names] if isinstance(names, str) else list(names)


def _request(args: Namespace) -> list[str]:
    model = served_names(args)[0]
    body = {"model": model, "messages": [{"role": "user", "content": example_question(args.model)}]}
    quoted = json.dumps(body).replace("'", "'\\''")
    lines = [
        f"curl {_where(args)}/v1/chat/completions -H 'Content-Type: application/json'",
        f"  -d '{quoted}'",
    ]
    if args.api_key:
        lines.insert(1, "  -H 'Authorization: Bearer YOUR_KEY'")
    return [f"{line} \\" for line in lines[:-1]] + lines[-1:]


def _where(args: Namespace) -> str:
    if args.uds:
        return f"--unix-socket {args.uds} http://localhost"
    scheme = "https" if args.ssl_keyfile and args.ssl_certfile else "http"
    host = args.host or "127.0.0.1"
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    host = f"[{host}]" if ":" in host else host
    return f"{scheme}://{host}:{args.port}{args.root_path or ''}"


def example_question(model: str) -> str:
    """A first question for a model, named as it is loaded, whatever it is served as."""
    if models.is_embedded(model):
        return puzzles.example_question()
    return "A train leaves at 9:40 and arrives at 13:05. How long does it travel?"

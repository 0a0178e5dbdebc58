"""One HTML page about a run, with everything it needs inside: no scripts, nothing fetched."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from rlkv_vllm.evaluation.plot import Point, accuracy_figure
from rlkv_vllm.files import one_line, write_text_atomic
from rlkv_vllm.profile.plot import profile_figure
from rlkv_vllm.profile.schema import EvaluationRow
from rlkv_vllm.statistics import wilson_interval
from rlkv_vllm.training.report_charts import (
    gate_summary_figure,
    gates_figure,
    image,
    number,
    training_figure,
)
from rlkv_vllm.training.run_folder import RunFolder, read_run

REPORT_FILE = "report.html"

#: A run that names no sparsity shows its heads at this one.
_DEFAULT_SPARSITY = 0.5

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1c2733; background: #fff; margin: 0 auto;
       max-width: 62rem; padding: 1.5rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .5rem; padding-top: .6rem;
     border-top: 1px solid #dfe4ea; }
p { margin: .4rem 0 .8rem; }
.by { color: #5a6775; }
.missing { background: #fff6e0; border-left: 4px solid #e0a100; padding: .5rem .8rem; }
img { max-width: 100%; height: auto; display: block; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th, td { padding: .25rem .8rem .25rem 0; text-align: right; border-bottom: 1px solid #e6eaef; }
th { font-weight: 600; color: #5a6775; }
th:first-child, td:first-child { text-align: left; }
tr.best td { background: #eaf5ea; }
.wide { overflow-x: auto; }
pre { background: #f5f7f9; padding: .8rem; overflow-x: auto; font-size: .85rem; line-height: 1.4; }
code { overflow-wrap: anywhere; }
"""


def write_report(run_dir: Path) -> Path:
    """Describe a run of `rlkv train` in `report.html` of its folder.

    Whatever of the run is there is shown, and what is not there is named: a run that was stopped,
    or whose profile was not evaluated, has a report too.

    Args:
        run_dir: the run's folder, see docs/training.md.

    Returns:
        The file.

    Raises:
        RlkvError: if the folder holds nothing of a run, or the file cannot be written.
    """
    run = read_run(run_dir)
    title = _title(run)
    sections = [
        _results(run),
        _curves(run),
        _gates(run),
        _refinement(run),
        _heads(run),
        _curriculum(run),
        _configuration(run),
    ]
    missing = ""
    if run.missing:
        items = "".join(f"<li>{escape(item)}</li>" for item in run.missing)
        missing = f'<div class="missing">Not in this report:<ul>{items}</ul></div>'
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="by">{escape(_byline(run))}</p>\n'
        f"{missing}\n{''.join(sections)}\n</body>\n</html>\n"
    )
    path = run_dir / REPORT_FILE
    write_text_atomic(path, page)
    return path


# --- sections ------------------------------------------------------------------------------


def _title(run: RunFolder) -> str:
    if run.profile is None:
        return f"Run of {run.model or 'an unknown model'} by rlkv: no profile"
    return f"Head profile of {run.model} by {run.profile.provenance.method}"


def _byline(run: RunFolder) -> str:
    parts = [f"run {run.name}"]
    if run.profile is not None:
        model, made = run.profile.model, run.profile.provenance
        parts += [
            f"{made.created}",
            f"{model.num_layers} layers of {model.num_kv_heads} KV heads",
            f"sink {run.profile.sink}, window {run.profile.window}",
        ]
        if made.seed is not None:
            parts.append(f"seed {made.seed}")
    if run.metrics:
        parts.append(f"{run.metrics[-1]['step']} steps")
        elapsed = number(run.metrics[-1].get("elapsed"))
        if elapsed is not None:
            parts.append(f"{elapsed / 60:.1f} minutes of training")
    return ", ".join(parts)


def _results(run: RunFolder) -> str:
    if run.profile is None or not run.profile.evaluation:
        return ""
    rows, best = run.profile.evaluation, run.profile.recommended_sparsity
    tasks = list(dict.fromkeys((row.task, row.n) for row in rows))
    advice = (
        "No sparsity solves 95% of the problems, so none is recommended."
        if best is None
        else f"Recommended: sparsity {best:g}, the largest one that solves at least 95%."
    )
    header = (
        "task, problems",
        "sparsity",
        "accuracy",
        "95% interval",
        "against full",
        "mean tokens",
        "p95",
        "at cap",
        "s/solved",
    )
    body = [
        _table_row(
            (
                f"{row.task}, {row.n}",
                f"{row.sparsity:g}",
                f"{row.accuracy:.3f}",
                "{:.3f}-{:.3f}".format(*_interval(row)),
                f"{row.accuracy - row.full_accuracy:+.3f}",
                f"{row.mean_output_tokens:.1f}",
                _shown(row.p95_output_tokens, "d"),
                _shown(row.capped_share, ".1%"),
                _shown(row.seconds_per_solved, ".3g"),
            ),
            "best" if row.sparsity == best else "",
        )
        for row in sorted(rows, key=lambda row: (tasks.index((row.task, row.n)), row.sparsity))
    ]
    series = {
        f"{task}, {n} problems": [
            Point(
                row.sparsity,
                row.accuracy,
                _interval(row),
                row.mean_output_tokens,
                row.p95_output_tokens,
            )
            for row in rows
            if (row.task, row.n) == (task, n)
        ]
        for task, n in tasks
    }
    plot = image(
        accuracy_figure(series, "Fresh problems"),
        "Accuracy and output length against sparsity; the numbers are in the table above.",
    )
    return _section(
        "Accuracy against sparsity",
        f"<p>Sparsity is the share of KV heads that keep only sink and window. {advice}</p>",
        f'<div class="wide"><table><thead>{_table_row(header, tag="th")}</thead><tbody>'
        f"{''.join(body)}</tbody></table></div>",
        plot,
    )


def _curves(run: RunFolder) -> str:
    figure = training_figure(run.metrics)
    if figure is None:
        return ""
    return _section(
        "Training",
        "<p>Per optimizer step: reward of the model's own answers, the penalty that pushes gates "
        "down, and how long the answers got.</p>",
        image(figure, "Reward, penalty, output tokens and share cut off over the steps"),
    )


def _gates(run: RunFolder) -> str:
    images = []
    summary = gate_summary_figure(run.metrics)
    if summary is not None:
        images.append(image(summary, "Mean of the gates and shares at either end over the steps"))
    if run.gates:
        images.append(image(gates_figure(run.gates), "Every gate over the steps"))
    if not images:
        return ""
    return _section(
        "Gates",
        "<p>A gate of 1 keeps the head's whole cache, a gate of 0 leaves it sink and window.</p>",
        *images,
    )


def _refinement(run: RunFolder) -> str:
    if not run.refinement:
        return ""
    rows = run.refinement.get("rows")
    body = [
        _table_row(
            (
                _shown(number(row.get("sparsity")), "g"),
                _shown(number(row.get("given")), ".3f"),
                _shown(number(row.get("found")), ".3f"),
                _named(row.get("become_streaming")),
                _named(row.get("become_full")),
            )
        )
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict)
    ]
    header = ("sparsity", "solved with the given gates", "found", "become streaming", "become full")
    p = _shown(number(run.refinement.get("p")), ".2g")
    end = "The found heads are taken" if run.refinement.get("is_taken") else "The gates are kept"
    return _section(
        "Refinement",
        "<p>A search for the full heads that serve best, by answers written with really split "
        f"heads. {end}: p {p}, one-sided, on problems that nothing was chosen by.</p>",
        f"<table><thead>{_table_row(header, tag='th')}</thead>"
        f"<tbody>{''.join(body)}</tbody></table>",
    )


def _named(heads: object) -> str:
    if not isinstance(heads, list) or not all(isinstance(h, list) and len(h) == 2 for h in heads):
        return "-"
    named = (f"layer {one_line(layer)} head {one_line(head)}" for layer, head in heads)
    return ", ".join(named) or "-"


def _heads(run: RunFolder) -> str:
    if run.profile is None:
        return ""
    best = run.profile.recommended_sparsity
    sparsity = best or _DEFAULT_SPARSITY
    why = "the recommended sparsity" if best else "where nothing is recommended"
    return _section(
        "Head map",
        f"<p>The gates of the profile, and which heads stay full heads at sparsity {sparsity:g}, "
        f"{why}.</p>",
        image(profile_figure(run.profile, sparsity), "Gates by layer and KV head"),
    )


def _curriculum(run: RunFolder) -> str:
    known = (
        ("tried", "problems tried"),
        ("kept", "kept: solved by the model with its full cache"),
        ("mean_tokens", "mean tokens of an answer"),
        ("capped_share", "share of the answers cut off"),
        ("longest", "tokens of the longest kept sample"),
        ("sha256", "SHA-256 of the kept set"),
    )
    rows = [
        _table_row((words, _plain(run.curriculum[key])))
        for key, words in known
        if run.curriculum.get(key) is not None
    ]
    if not rows:
        return ""
    return _section("Curriculum", f"<table><tbody>{''.join(rows)}</tbody></table>")


def _configuration(run: RunFolder) -> str:
    parts = []
    if run.config:
        comments = [line[1:].strip() for line in run.config.split("\n") if line.startswith("#")]
        parts += [f"<p><code>{escape(line)}</code></p>" for line in comments]
        body = "\n".join(line for line in run.config.split("\n") if not line.startswith("#"))
        parts.append(f"<p>run.yaml:</p><pre>{escape(body.strip())}</pre>")
    if run.profile is not None:
        made = run.profile.provenance
        versions = ", ".join(f"{name} {version}" for name, version in made.versions.items())
        rows = [
            ("data", made.data or "-"),
            ("source", made.source or "-"),
            ("versions", versions or "-"),
            ("SHA-256 of the profile", run.profile.sha256()),
        ]
        parts.append(f"<table><tbody>{''.join(map(_table_row, rows))}</tbody></table>")
    return _section("Configuration", *parts) if parts else ""


# --- pieces --------------------------------------------------------------------------------


def _section(title: str, *parts: str) -> str:
    return f"\n<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def _table_row(cells: Sequence[str], css: str = "", tag: str = "td") -> str:
    opening = f'<tr class="{css}">' if css else "<tr>"
    return opening + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>\n"


def _interval(row: EvaluationRow) -> tuple[float, float]:
    return wilson_interval(round(row.accuracy * row.n), row.n)


def _shown(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _plain(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else one_line(value)

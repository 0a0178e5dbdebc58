"""What the tests of deploy/ read there."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

from tests.support import ROOT

DEPLOY = ROOT / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "rlkv.json"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"

_METRIC = re.compile(r"\b(?:rlkv|vllm):\w+")


def panels() -> list[dict[str, Any]]:
    """The dashboard's panels that show something."""
    dashboard = json.loads(DASHBOARD.read_text())
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def metric_names() -> set[str]:
    """All metrics in the dashboard and the alert rules."""
    rules = [
        rule["expr"]
        for group in yaml.safe_load(ALERTS.read_text())["groups"]
        for rule in group["rules"]
    ]
    queries = [target["expr"] for panel in panels() for target in panel["targets"]]
    return {name for query in [*rules, *queries] for name in _METRIC.findall(query)}

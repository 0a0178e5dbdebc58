"""The files of deploy/ and the Dockerfile, as far as they can be judged without an engine."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import rlkv_vllm
from rlkv_vllm.bench.server import free_port
from rlkv_vllm.engine.launch import SCHEDULER, WORKER_EXTENSION
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.serving import healthcheck
from rlkv_vllm.serving.arguments import parse
from rlkv_vllm.tasks.puzzles import example_question, make_problems
from tests.support.deploy import ALERTS, DASHBOARD, DEPLOY, ROOT, metric_names, panels

COMPOSE_FILES = sorted(DEPLOY.glob("compose*.yaml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, cwd=ROOT, check=False
    )


def promtool(*arguments: str | Path) -> None:
    if shutil.which("promtool") is None:
        pytest.skip("promtool is missing: apt-get install prometheus")
    result = run("promtool", *arguments)
    assert result.returncode == 0, result.stdout + result.stderr


# --- images


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    result = run(hadolint if hadolint.exists() else "hadolint", ROOT / "Dockerfile")
    assert (result.returncode, result.stdout) == (0, "")


def test_the_images_have_the_version_of_the_package() -> None:
    versions = re.findall(r"^ARG VERSION=(.*)$", DOCKERFILE, re.MULTILINE)
    assert set(versions) == {rlkv_vllm.__version__}


def test_whatever_the_dockerfile_copies_is_sent_to_the_engine() -> None:
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert {f"!{source}", f"!{Path(source).parent}/requirements-*.txt"} & set(sent), source


def pins(name: str) -> dict[str, str]:
    lines = (DEPLOY / f"requirements-{name}.txt").read_text().splitlines()
    found = [line.split("==") for line in lines if not line.startswith("#")]
    names = [canonicalize_name(package) for package, _ in found]
    assert len(names) == len(set(names))
    return dict(zip(names, (version for _, version in found), strict=True))


@pytest.mark.parametrize("extra", ["cpu", "train"])
def test_the_lists_have_versions_that_the_package_takes(extra: str) -> None:
    listed = pins("cpu") | (pins("train") if extra == "train" else {})
    wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"][extra]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(listed[canonicalize_name(requirement.name)])
    assert not set(pins("cpu")) & set(pins("train"))


def test_torch_is_the_one_of_the_makefile() -> None:
    torch = re.search(r"^TORCH := torch==(.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert torch is not None
    assert torch[1] == pins("cpu")["torch"]


def test_every_module_that_is_named_exists() -> None:
    files = [ROOT / name for name in ("Dockerfile", "Makefile", ".ci/run")]
    files += [path for path in DEPLOY.rglob("*") if path.suffix in (".sh", ".yaml", ".yml")]
    text = "\n".join(path.read_text() for path in files)
    for module, names in re.findall(r"from (rlkv_vllm[\w.]*) import ([\w, ]+)", text):
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
    for module in re.findall(r"-m[\s\",]+(rlkv_vllm[\w.]*|tests\.[\w.]+)", text):
        assert importlib.util.find_spec(module), module


def test_every_target_of_the_makefile_is_phony_or_a_file() -> None:
    makefile = (ROOT / "Makefile").read_text()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert sorted(phony.split()) == sorted(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))


# --- compose


@pytest.mark.parametrize("file", COMPOSE_FILES, ids=lambda file: file.name)
def test_compose_files_follow_the_schema(file: Path) -> None:
    schema = json.loads((ROOT / "tests/data/compose-spec.schema.json").read_text())
    validator = jsonschema.Draft202012Validator(schema)
    content = yaml.safe_load(file.read_text())
    assert [error.message for error in validator.iter_errors(content)] == []
    for name, service in content["services"].items():
        image = service["image"]
        tag = _VARIABLE.sub(lambda found: found[2], image).rpartition(":")[2]
        assert tag, image
        assert tag != "latest", f"{name} is not pinned"
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (
                (DEPLOY / source).exists()
                if source.startswith(".")
                else source in (content["volumes"])
            )


def test_a_wrong_compose_file_breaks_the_schema() -> None:
    schema = json.loads((ROOT / "tests/data/compose-spec.schema.json").read_text())
    content = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    content["services"]["serve"]["port"] = ["8000:8000"]
    with pytest.raises(jsonschema.ValidationError, match="port"):
        jsonschema.Draft202012Validator(schema).validate(content)


def test_compose_merges_the_files() -> None:
    """With Docker's own client, where there is one: as a user combines them."""
    if shutil.which("docker") is None or run("docker", "compose", "version").returncode:
        pytest.skip("no docker compose on this machine")
    for files in (
        ["compose.yaml"],
        ["compose.yaml", "compose.gpu.yaml", "compose.monitoring.yaml"],
        ["compose.train.yaml"],
        ["compose.train.yaml", "compose.train.gpu.yaml"],
    ):
        named = [part for file in files for part in ("-f", str(DEPLOY / file))]
        result = run("docker", "compose", *named, "config", "--quiet")
        assert result.returncode == 0, result.stderr


def test_every_setting_is_in_the_example_and_has_the_same_default() -> None:
    example = dict(
        re.findall(r"^#?([A-Z_]+)=(.*)$", (DEPLOY / ".env.example").read_text(), re.MULTILINE)
    )
    used: dict[str, set[str]] = {}
    for file in COMPOSE_FILES:
        for name, default in _VARIABLE.findall(file.read_text()):
            used.setdefault(name, set()).add(default)
    assert set(used) == set(example)
    for name, value in example.items():
        assert value in used[name] or any(d.endswith(f":{value}") for d in used[name]), name


def test_defaults_stay_on_this_machine() -> None:
    for file in COMPOSE_FILES:
        for service in yaml.safe_load(file.read_text())["services"].values():
            for port in service.get("ports", []):
                assert port.startswith("${RLKV_BIND:-127.0.0.1}:"), f"{file.name}: {port}"


# --- serve/*.yaml


@pytest.mark.parametrize("file", sorted((DEPLOY / "serve").iterdir()), ids=lambda file: file.stem)
def test_configurations_are_taken_by_rlkv_serve(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    written = yaml.safe_load(file.read_text())
    args = parse(["--config", str(file)])
    assert args.model_name == written["model"]
    assert args.profile == written["profile"]
    assert args.sparsity == written["sparsity"]
    if args.model_name != "embedded":
        assert args.model == written["model"]
        assert args.max_model_len == written["max-model-len"]
        assert args.reasoning_parser == written["reasoning-parser"]
    assert parse(["--config", str(file), "--sparsity", "0.125"]).sparsity == 0.125


def test_a_wrong_key_of_a_configuration_is_refused(tmp_path: Path) -> None:
    (tmp_path / "serve.yaml").write_text("model: embedded\nsparsty: 0.5\n")
    with pytest.raises(RlkvError, match="sparsty"):
        parse(["--config", str(tmp_path / "serve.yaml")])


# --- monitoring


def test_alert_rules_are_valid() -> None:
    promtool("check", "rules", ALERTS)


def test_alert_rules_fire_when_they_should() -> None:
    promtool("test", "rules", DEPLOY / "prometheus" / "alerts_test.yml")


def test_every_alert_rule_is_tested_and_says_what_to_do() -> None:
    rules = [
        rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]
    ]
    tests = yaml.safe_load((DEPLOY / "prometheus" / "alerts_test.yml").read_text())["tests"]
    checks = [check for test in tests for check in test["alert_rule_test"]]
    for rule in rules:
        assert rule["annotations"].keys() == {"summary", "description"}
        for fires in (True, False):
            assert any(
                check["alertname"] == rule["alert"] and bool(check.get("exp_alerts")) == fires
                for check in checks
            ), f"{rule['alert']} {'firing' if fires else 'silent'}"


def test_prometheus_configuration_is_valid() -> None:
    promtool("check", "config", DEPLOY / "prometheus" / "prometheus.yml")


def test_queries_of_the_dashboard_are_valid(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{panel['id']}_{target['refId']}", "expr": plain_expression(target)}
        for panel in panels()
        for target in panel["targets"]
    ]
    assert len(rules) > 20
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", file)


def plain_expression(target: dict[str, Any]) -> str:
    expression: str = target["expr"]
    for variable, value in (("$__rate_interval", "1m"), ("$model", ".*"), ("$instance", ".*")):
        expression = expression.replace(variable, value)
    assert "$" not in expression
    return expression


def test_our_metrics_of_dashboard_and_alerts_are_documented() -> None:
    documented = set(re.findall(r"`(rlkv:\w+)`", (ROOT / "docs/monitor.md").read_text()))
    used = {name for name in metric_names() if name.startswith("rlkv:")}
    assert used
    assert used <= documented
    # What is measured is also shown.
    assert {name for name in documented if name not in used} <= {"rlkv:requests_running"}


def test_every_panel_says_what_it_shows() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    names = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert {"datasource", "model", "instance"} == names
    identifiers = [panel["id"] for panel in dashboard["panels"]]
    assert len(identifiers) == len(set(identifiers))
    taken: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert place["x"] + place["w"] <= 24
        assert not taken & cells, panel["title"]
        taken |= cells
    for panel in panels():
        assert panel["title"]
        assert len(panel["description"]) > 20, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"]
            assert target["datasource"]["uid"] == "${datasource}"


def test_grafanas_own_types_know_all_fields_of_the_dashboard() -> None:
    register_default_plugins()
    written = json.loads(DASHBOARD.read_text())
    model = Dashboard.from_json(json.loads(DASHBOARD.read_text()))
    understood = json.loads(JSONEncoder().encode(model))
    # Grafana 12 writes these; the published types are those of 10.1.
    newer = {"builtIn", "definition", "wideLayout"}
    assert set(lost_fields(written, understood)) == newer


def lost_fields(written: Any, understood: Any) -> Iterator[str]:
    """Names of fields that are gone or changed."""
    if isinstance(written, dict):
        for name, value in written.items():
            if name in understood:
                yield from lost_fields(value, understood[name])
            else:
                yield name
    elif isinstance(written, list):
        for value, other in zip(written, understood, strict=True):
            yield from lost_fields(value, other)
    else:
        assert written == understood


def test_grafana_finds_dashboard_and_data_source() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    source = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())
    provider = yaml.safe_load((provisioning / "dashboards/rlkv.yaml").read_text())
    compose = yaml.safe_load((DEPLOY / "compose.monitoring.yaml").read_text())["services"]
    mounted = dict(reversed(volume.split(":")[:2]) for volume in compose["grafana"]["volumes"])
    assert source["datasources"][0]["url"] == "http://prometheus:9090"
    assert "prometheus" in compose
    assert mounted[provider["providers"][0]["options"]["path"]] == "./grafana/dashboards"
    home = Path(compose["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert (DEPLOY / mounted[str(home.parent)] / home.name) == DASHBOARD


# --- smoke test and health check


def test_the_question_of_the_smoke_test_is_the_testbeds_own() -> None:
    script = (DEPLOY / "smoke.sh").read_text()
    problem = make_problems("hops", 1, seed=0, scale=0.3)[0]
    assert problem.prompt == example_question()
    assert f"question='{problem.prompt}'" in script
    assert f'"${{answer##* }}" = {problem.answer} ]' in script


def test_without_a_server_both_say_so() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    found = healthcheck.problem(url, None)
    assert found is not None
    assert url in found
    result = subprocess.run(
        [DEPLOY / "smoke.sh", url],
        env={"PATH": "/usr/local/bin:/usr/bin:/bin", "TIMEOUT": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert f"{url}/health does not answer after 1 s" in result.stderr


# --- Kubernetes


def test_values_for_the_helm_chart_name_the_split_as_vllm_takes_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    values = yaml.safe_load((DEPLOY / "kubernetes/production-stack-values.yaml").read_text())
    (model,) = values["servingEngineSpec"]["modelSpec"]
    # What the chart's schema asks for.
    assert {
        "name", "repository", "tag", "modelURL", "replicaCount", "requestCPU", "requestMemory",
        "requestGPU", "pvcStorage",
    } <= model.keys()  # fmt: skip
    args = parse([model["modelURL"], *model["vllmConfig"]["extraArgs"]])
    assert args.worker_extension_cls == WORKER_EXTENSION
    assert args.scheduler_cls == SCHEDULER
    folder = model["extraVolumeMounts"][0]["mountPath"]
    assert Path(args.additional_config["rlkv"]["profile"]).parent == Path(folder)
    assert args.additional_config["rlkv"].keys() <= {"profile", "sparsity"}
    assert "lmcacheConfig" not in model

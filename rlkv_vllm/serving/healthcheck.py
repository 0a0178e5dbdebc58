"""Is the server up, and is its KV cache split? Exit status 0 or 1, for container health checks.

    python -m rlkv_vllm.serving.healthcheck [URL]

Standard library only: it runs every few seconds beside the server.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request

DEFAULT_URL = "http://127.0.0.1:8000"
_TIMEOUT_S = 8.0


def problem(url: str, key: str | None) -> str | None:
    """Why the server at `url` is not healthy; None if it answers and its cache is split."""
    try:
        _get(f"{url}/health", None)
        status = json.loads(_get(f"{url}/v1/rlkv", key))
    except urllib.error.HTTPError as error:
        if error.code == 401:
            return f"{error.url}: status 401: set VLLM_API_KEY to the server's API key"
        if error.code == 404:
            return f"{error.url}: status 404: this server has full caches, not split ones"
        return f"{error.url}: status {error.code}"
    except (OSError, ValueError) as error:
        return f"{url}: {error}"
    if not isinstance(status, dict) or status.get("active") is not True:
        return f"{url}/v1/rlkv: the split is not active"
    return None


def _get(url: str, key: str | None) -> bytes:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as answer:
        content: bytes = answer.read()
    return content


def main() -> int:
    """Check the server named by the first argument or ``RLKV_URL``; print what is wrong."""
    url = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("RLKV_URL") or DEFAULT_URL
    found = problem(url.rstrip("/"), os.environ.get("VLLM_API_KEY"))
    if found is None:
        return 0
    print(f"unhealthy: {found}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

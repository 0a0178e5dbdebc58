"""Other people's clients against the server: what they hand on, as docs/serve.md says.

The official client is used by all other tests.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import litellm
import pytest
from langchain_openai import ChatOpenAI

from rlkv_vllm.models import model_dir
from rlkv_vllm.tasks.puzzles import ReasonedProblem
from tests.support.asking import is_right, problems
from tests.support.server import KEY, Server, environment, metric

#: Of litellm's own types.
pytestmark = pytest.mark.filterwarnings("ignore:.*ReadOnly.*:UserWarning")


@pytest.fixture
def problem() -> ReasonedProblem:
    return problems(per_family=1)[0]


@pytest.mark.parametrize("stream", [False, True])
def test_litellm_hands_the_reasoning_on(
    server: Server, problem: ReasonedProblem, stream: bool
) -> None:
    reply = litellm.completion(
        model="openai/embedded",
        api_base=f"{server.url}/v1",
        api_key=KEY,
        messages=[{"role": "user", "content": problem.prompt}],
        temperature=0,
        stream=stream,
        **({"stream_options": {"include_usage": True}} if stream else {}),
    )
    if not stream:
        message, usage = reply.choices[0].message, reply.usage
        reasoning, content = message.reasoning_content, message.content
    else:
        reasoning = content = ""
        usage = None
        for chunk in reply:
            if chunk.choices:
                delta = chunk.choices[0].delta
                reasoning += getattr(delta, "reasoning_content", None) or ""
                content += delta.content or ""
            usage = getattr(chunk, "usage", None) or usage
    assert is_right(content, problem)
    assert len(reasoning.split()) > 20
    assert usage.completion_tokens > usage.completion_tokens_details.reasoning_tokens > 20


def langchain(server: Server, **options: bool) -> ChatOpenAI:
    return ChatOpenAI(
        model="embedded", base_url=f"{server.url}/v1", api_key=KEY, temperature=0, **options
    )


def test_langchain_answers_and_counts_but_drops_the_reasoning(
    server: Server, problem: ReasonedProblem
) -> None:
    model = langchain(server, stream_usage=True)
    whole = model.invoke(problem.prompt)
    parts = list(model.stream(problem.prompt))
    streamed = parts[0]
    for part in parts[1:]:
        streamed += part
    assert len(parts) > 3
    for message in (whole, streamed):
        assert is_right(message.content, problem)
        assert "reasoning" not in message.additional_kwargs
        usage = message.usage_metadata
        assert usage["output_tokens"] > usage["output_token_details"]["reasoning"] > 20


def test_langchain_hands_the_reasoning_on_in_responses_mode(
    server: Server, problem: ReasonedProblem
) -> None:
    message = langchain(server, use_responses_api=True).invoke(problem.prompt)
    assert is_right(message.text, problem)
    (block,) = (block for block in message.content if block["type"] == "reasoning")
    assert len(block["content"][0]["text"].split()) > 20
    assert message.usage_metadata["output_tokens"] > 20


#: `vllm bench serve`; the console script of the CPU wheel does not start.
_BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


def test_vllms_own_benchmark(server: Server, tmp_path: Path) -> None:
    flags = {
        "--base-url": server.url,
        "--model": "embedded",
        "--tokenizer": str(model_dir()),
        "--dataset-name": "random",
        "--num-prompts": "6",
        "--random-input-len": "100",
        "--random-output-len": "30",
        "--result-dir": str(tmp_path),
        "--result-filename": "result.json",
    }
    before = metric(server, "vllm:generation_tokens_total")
    subprocess.run(
        [
            *(sys.executable, "-c", _BENCH, "--ignore-eos", "--save-result", "--disable-tqdm"),
            *(word for pair in flags.items() for word in pair),
        ],
        env=environment(OPENAI_API_KEY=KEY),
        check=True,
        timeout=180,
    )
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["completed"], result["failed"]) == (6, 0)
    assert result["total_output_tokens"] == 6 * 30
    assert metric(server, "vllm:generation_tokens_total") - before >= 6 * 30

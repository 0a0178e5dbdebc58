"""What a request may ask for, on one split engine with a tokenizer; compared with the oracle.

Sampled tokens are checked by their log-probabilities, which vLLM reports before temperature,
masks and penalties: the oracle's at every position of every completion.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from vllm import LLM, SamplingParams
from vllm.config.kv_events import KVEventsConfig
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.sampling_params import BeamSearchParams, StructuredOutputsParams
from vllm.v1.core.kv_cache_utils import get_block_hash, get_group_id, maybe_convert_block_hash

from rlkv_vllm.allocation.heads import allocate
from rlkv_vllm.models import MODEL_NAME, model_dir
from rlkv_vllm.profile.lookup import find_profile
from rlkv_vllm.tasks.puzzles import FAMILIES, make_problems
from tests.support import ROOT, oracle
from tests.support.engines import EngineCache, block_pool, pool_is_restored, scheduler

SPARSITY, END = 0.5, 3  # <|end|>
BLOCKS = 150


@pytest.fixture(scope="module")
def profile_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    profile, path = find_profile(MODEL_NAME)
    text = path.read_text().replace(
        f'"recommended_sparsity": {profile.recommended_sparsity}',
        f'"recommended_sparsity": {SPARSITY}',
    )
    changed = tmp_path_factory.mktemp("profile") / "profile.json"
    changed.write_text(text)
    assert find_profile(str(changed))[0].recommended_sparsity == SPARSITY
    return changed


@pytest.fixture
def llm(profile_path: Path, engines: EngineCache) -> LLM:
    llm = engines.get(
        model_dir(),
        profile_path,
        skip_tokenizer_init=False,
        enable_prefix_caching=True,
        num_gpu_blocks_override=BLOCKS,
        max_model_len=1024,
        block_size=16,
        enable_prompt_embeds=True,
        kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
    )
    assert llm.reset_prefix_cache()
    return llm


@pytest.fixture(scope="module")
def expected() -> Callable[[list[int]], torch.Tensor]:
    """Log-probabilities ``[tokens, vocabulary]`` after each token, by the oracle."""
    profile, _ = find_profile(MODEL_NAME)
    full = allocate(profile.gates, SPARSITY).full
    return lambda tokens: oracle.logprobs(model_dir(), tokens, full, profile.sink, profile.window)


Expected = Callable[[list[int]], torch.Tensor]


def prompt(llm: LLM, number: int = 0) -> list[int]:
    """A problem as the chat template puts it."""
    family = list(FAMILIES)[number % len(FAMILIES)]
    problem = make_problems(family, 1, seed=100 + number)[0]
    ids = llm.get_tokenizer().apply_chat_template(
        [{"role": "user", "content": problem.prompt}], add_generation_prompt=True
    )
    return list(ids["input_ids"] if isinstance(ids, dict) or hasattr(ids, "keys") else ids)


def ask(llm: LLM, prompts: list[list[int]], params: Any, **more: Any) -> list[Any]:
    inputs: Any = [{"prompt_token_ids": p, **more} for p in prompts]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    assert pool_is_restored(llm)
    return list(outputs)


def assert_logprobs_are_the_oracles(
    expected: Expected, prompt: list[int], completion: Any
) -> torch.Tensor:
    """Of every token of a completion; returns the oracle's for the completion."""
    tokens = list(completion.token_ids)
    rows = expected([*prompt, *tokens[:-1]])[len(prompt) - 1 :]
    for row, token, given in zip(rows, tokens, completion.logprobs, strict=True):
        assert given[token].logprob == pytest.approx(row[token].item(), abs=1e-4)
    return rows


def greedy(**options: Any) -> SamplingParams:
    return SamplingParams(temperature=0, **({"max_tokens": 100, "logprobs": 1} | options))


def test_several_completions_of_one_prompt(llm: LLM, expected: Expected) -> None:
    asked = [prompt(llm, n) for n in range(3)]
    params = SamplingParams(
        n=4, temperature=2.0, seed=5, max_tokens=60, logprobs=1, ignore_eos=True
    )
    for question, output in zip(asked, ask(llm, asked, params), strict=True):
        assert len({tuple(c.token_ids) for c in output.outputs}) == 4
        for completion in output.outputs:
            assert_logprobs_are_the_oracles(expected, question, completion)


def test_a_seed_repeats_its_answer(llm: LLM, expected: Expected) -> None:
    question = prompt(llm)

    def sampled(seed: int) -> list[int]:
        params = SamplingParams(temperature=2.0, seed=seed, max_tokens=60, logprobs=1)
        # Others in the batch, so that the same request meets other neighbours.
        output = ask(llm, [prompt(llm, seed), question], params)[1]
        assert_logprobs_are_the_oracles(expected, question, output.outputs[0])
        return list(output.outputs[0].token_ids)

    first = sampled(1)
    assert sampled(1) == first
    assert sampled(2) != first


def test_logprobs_of_answer_and_prompt(llm: LLM, expected: Expected) -> None:
    question = prompt(llm, 1)
    ask(llm, [question], greedy(max_tokens=4))  # its prompt is in the prefix cache now
    params = greedy(max_tokens=20, logprobs=5, prompt_logprobs=3)
    output = ask(llm, [question], params)[0]
    completion = output.outputs[0]
    rows = assert_logprobs_are_the_oracles(expected, question, completion)
    for row, given in zip(rows, completion.logprobs, strict=True):
        best = row.topk(5)
        by_rank = sorted(given.values(), key=lambda entry: entry.rank)[:5]
        assert [e.logprob for e in by_rank] == pytest.approx(best.values.tolist(), abs=1e-4)
    assert output.prompt_logprobs[0] is None
    rows = expected(question)
    for position in range(1, len(question)):
        given = output.prompt_logprobs[position]
        for token in (question[position], *rows[position - 1].topk(3).indices.tolist()):
            if token in given:
                want = rows[position - 1][token].item()
                assert given[token].logprob == pytest.approx(want, abs=1e-4)
        assert question[position] in given
        assert len(given) >= 3


def test_shortest_and_longest_answers(llm: LLM, expected: Expected) -> None:
    question = prompt(llm, 2)
    free = ask(llm, [question], greedy(max_tokens=400))[0].outputs[0]
    assert free.finish_reason == "stop"
    assert free.token_ids[-1] == END
    length = len(free.token_ids)
    short = ask(llm, [question], greedy(max_tokens=7))[0].outputs[0]
    assert short.finish_reason == "length"
    assert list(short.token_ids) == list(free.token_ids[:7])
    longer = ask(llm, [question], greedy(max_tokens=400, min_tokens=length + 5))[0].outputs[0]
    assert len(longer.token_ids) >= length + 5
    assert list(longer.token_ids[: length - 1]) == list(free.token_ids[:-1])
    assert END not in longer.token_ids[: length + 5]
    assert_logprobs_are_the_oracles(expected, question, longer)


def test_stop_strings_and_tokens(llm: LLM) -> None:
    question = prompt(llm, 3)
    free = ask(llm, [question], greedy(max_tokens=400))[0].outputs[0]
    end_of_thought = llm.get_tokenizer().convert_tokens_to_ids("</think>")
    place = list(free.token_ids).index(end_of_thought)
    by_token = ask(llm, [question], greedy(max_tokens=400, stop_token_ids=[end_of_thought]))[0]
    assert list(by_token.outputs[0].token_ids) == list(free.token_ids[: place + 1])
    assert by_token.outputs[0].stop_reason == end_of_thought
    by_text = ask(llm, [question], greedy(max_tokens=400, stop=["</think>"]))[0].outputs[0]
    assert list(by_text.token_ids) == list(free.token_ids[: place + 1])
    assert by_text.stop_reason == "</think>"
    assert "</think>" not in by_text.text


def test_beam_search_is_that_over_the_oracle(llm: LLM, expected: Expected) -> None:
    question, width, length = prompt(llm), 3, 6
    found = llm.beam_search(
        [{"prompt_token_ids": question}],  # type: ignore[list-item]
        BeamSearchParams(beam_width=width, max_tokens=length, ignore_eos=True),
    )[0].sequences
    assert pool_is_restored(llm)
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(length):
        grown = []
        for score, tokens in beams:
            best = expected([*question, *tokens])[-1].topk(2 * width)
            grown += [
                (score + value, [*tokens, token])
                for value, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)
            ]
        beams = sorted(grown, key=lambda beam: -beam[0])[:width]
    assert [list(s.tokens[len(question) :]) for s in found] == [tokens for _, tokens in beams]
    scores = [s.cum_logprob for s in found]
    assert scores == pytest.approx([score for score, _ in beams], abs=1e-3)


@pytest.mark.parametrize(
    ("constraint", "language"),
    [
        ({"regex": r"answer[0-9]"}, [f"answer{digit}" for digit in range(10)]),
        ({"choice": ["done", "halt", "hops"]}, ["done", "halt", "hops"]),
        ({"json": {"enum": [1, 2, 30]}}, ["1", "2", "30"]),
    ],
    ids=["regex", "choice", "json"],
)
def test_structured_output(
    constraint: dict[str, Any], language: list[str], llm: LLM, expected: Expected
) -> None:
    """The oracle's choice among the tokens with which a sentence of the language can go on."""
    words = llm.get_tokenizer().convert_ids_to_tokens(range(len(llm.get_tokenizer())))
    asked = [prompt(llm, n) for n in range(4)]
    params = greedy(max_tokens=12, structured_outputs=StructuredOutputsParams(**constraint))
    for question, output in zip(asked, ask(llm, asked, params), strict=True):
        tokens = list(output.outputs[0].token_ids)
        rows = expected([*question, *tokens[:-1]])[len(question) - 1 :]
        said = ""
        for row, token, given in zip(rows, tokens, output.outputs[0].logprobs, strict=True):
            allowed = [
                i
                for i, word in enumerate(words)
                if (i == END and said in language)
                or (i != END and any(entry.startswith(said + word) for entry in language))
            ]
            among = torch.log_softmax(row[allowed], -1)
            assert token == allowed[int(among.argmax())]
            # vLLM masks before it takes log-probabilities.
            assert given[token].logprob == pytest.approx(among.max().item(), abs=1e-4)
            said += "" if token == END else words[token]
        assert said in language
        assert tokens[-1] == END


def test_cache_salt_separates_tenants(llm: LLM, expected: Expected) -> None:
    question = prompt(llm)
    cached = []
    for salt in ("red", "red", "blue", "blue"):
        output = ask(llm, [question], greedy(max_tokens=20), cache_salt=salt)[0]
        cached.append(output.num_cached_tokens)
        assert_logprobs_are_the_oracles(expected, question, output.outputs[0])
    hit = (len(question) - 1) // 16 * 16
    assert hit > 0
    assert cached == [0, hit, 0, hit]


def test_eviction_and_refill(llm: LLM, expected: Expected) -> None:
    """A prompt is cached, pushed out by others, computed anew, and hit again."""
    question = prompt(llm)
    cached, answers = [], []
    for step in range(4):
        if step == 2:
            others = [
                [4 + (n * 31 + i * 7) % 300 for i in range(500)] for n in range(2 * BLOCKS // 31)
            ]
            ask(llm, others, greedy(max_tokens=2, ignore_eos=True))
        output = ask(llm, [question], greedy())[0]
        cached.append(output.num_cached_tokens > 0)
        answers.append(list(output.outputs[0].token_ids))
        rows = assert_logprobs_are_the_oracles(expected, question, output.outputs[0])
        assert rows.argmax(-1).tolist() == answers[-1]
    assert cached == [False, True, False, True]
    assert answers == [answers[0]] * 4


def test_kv_events_tell_what_is_cached(
    llm: LLM, expected: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader of the events knows the prefix cache, group by group, block by block."""
    batches: list[Any] = []
    monkeypatch.setattr(scheduler(llm).kv_event_publisher, "publish", batches.append)
    others = [[4 + (n * 31 + i * 7) % 300 for i in range(500)] for n in range(BLOCKS // 31)]
    for prompts in ([prompt(llm, n) for n in range(4)], others, [prompt(llm, 0)]):
        ask(llm, prompts, greedy(max_tokens=40, ignore_eos=True))
    known: Counter[tuple[int, Any]] = Counter()
    removed = 0
    for event in (event for batch in batches for event in batch.events):
        if isinstance(event, AllBlocksCleared):
            known.clear()
        elif isinstance(event, BlockStored):
            kind = "full_attention" if event.group_idx == 0 else "sliding_window"
            assert event.kv_cache_spec_kind == kind
            known.update((event.group_idx, block) for block in event.block_hashes)
        elif isinstance(event, BlockRemoved):
            removed += len(event.block_hashes)
            known.subtract((event.group_idx, block) for block in event.block_hashes)
    cached = {
        (get_group_id(key), maybe_convert_block_hash(get_block_hash(key)))
        for key in block_pool(llm).cached_block_hash_to_block._cache
    }
    assert removed
    assert {group for group, _ in cached} == set(
        range(len(scheduler(llm).kv_cache_config.kv_cache_groups))
    )
    assert set(+known) == cached


def test_prompt_embeddings(llm: LLM, expected: Expected) -> None:
    """The embeddings of a prompt's tokens are answered as the tokens are."""
    question = prompt(llm, 1)
    table = load_file(model_dir() / "model.safetensors")["model.embed_tokens.weight"].float()
    for _ in range(2):
        output = llm.generate(
            {"prompt_embeds": table[question]}, greedy(max_tokens=60), use_tqdm=False
        )[0]
        rows = assert_logprobs_are_the_oracles(expected, question, output.outputs[0])
        assert rows.argmax(-1).tolist() == list(output.outputs[0].token_ids)
    assert output.num_cached_tokens == (len(question) - 1) // 16 * 16
    assert pool_is_restored(llm)


def test_reset_of_the_prefix_cache(llm: LLM, expected: Expected) -> None:
    question = prompt(llm, 1)
    cached = []
    for _ in range(2):
        assert llm.reset_prefix_cache()
        for _ in range(2):
            output = ask(llm, [question], greedy(max_tokens=20))[0]
            cached.append(output.num_cached_tokens > 0)
            assert_logprobs_are_the_oracles(expected, question, output.outputs[0])
    assert cached == [False, True, False, True]


def test_reset_of_the_prefix_cache_while_requests_run(llm: LLM, expected: Expected) -> None:
    core, question = llm.llm_engine, prompt(llm, 2)
    core.add_request("a", {"prompt_token_ids": question}, greedy(max_tokens=60, ignore_eos=True))
    done = []
    for step in range(400):
        if not core.has_unfinished_requests():
            break
        done += [output for output in core.step() if output.finished]
        if step in (5, 30):
            assert scheduler(llm).running
            assert core.reset_prefix_cache(reset_running_requests=True)
    rows = assert_logprobs_are_the_oracles(expected, question, done[0].outputs[0])
    assert rows.argmax(-1).tolist() == list(done[0].outputs[0].token_ids)
    assert pool_is_restored(llm)


#: A process of its own: where numba is imported, as for n-grams, vLLM starts no second engine.
_DRAFTS = """
import json, sys
from pathlib import Path
from tests.support.engines import engine, generate, pool_is_restored, preemptions, scheduler
model, profile, options, waves = json.loads(sys.stdin.read())
with engine(Path(model), Path(profile), **options) as llm:
    drafts, count = [], scheduler(llm).make_spec_decoding_stats
    def counting(*args, **kwargs):
        drafts.append([kwargs["num_draft_tokens"], kwargs["num_accepted_tokens"]])
        return count(*args, **kwargs)
    scheduler(llm).make_spec_decoding_stats = counting
    with preemptions(llm) as preempted:
        outputs = [output for wave in waves for output in generate(llm, wave)]
    print("RESULT", json.dumps({
        "drafts": drafts, "preempted": len(preempted), "restored": pool_is_restored(llm),
        "cached": [output.num_cached_tokens for output in outputs],
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
    }))
"""


def test_rejected_drafts_do_not_disturb_a_ring(
    llm: LLM, profile_path: Path, expected: Expected
) -> None:
    """Speculative decoding with n-grams, in chunks, from the prefix cache, with preemptions."""
    asked = [prompt(llm, n) for n in range(12)]
    options = {
        "enable_prefix_caching": True,
        "num_gpu_blocks_override": 100,
        "max_model_len": 512,
        "max_num_batched_tokens": 100,
        "block_size": 16,
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 5,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 3,
        },
    }
    done = subprocess.run(
        [sys.executable, "-c", _DRAFTS],
        input=json.dumps([str(model_dir()), str(profile_path), options, [asked, asked[-1:]]]),
        cwd=ROOT,
        text=True,
        capture_output=True,
        check=False,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    assert lines, done.stderr[-3000:]
    result = json.loads(lines[0].removeprefix("RESULT "))
    drafted, accepted = map(sum, zip(*result["drafts"], strict=True))
    assert accepted > 200
    assert drafted - accepted > 200
    assert result["preempted"]
    assert result["cached"][-1]
    assert result["restored"]
    for question, tokens in zip([*asked, asked[-1]], result["tokens"], strict=True):
        rows = expected([*question, *tokens[:-1]])[len(question) - 1 :]
        assert rows.argmax(-1).tolist() == tokens

"""The tokenizer, as the chat endpoint, the detokenizer and the reasoning parser of vLLM use it."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlkv_vllm.models import REASONING_PARSER
from rlkv_vllm.tasks.puzzles import FAMILIES, make_problem, vocabulary
from rlkv_vllm.testbed.tokenizer import SPECIAL, UNKNOWN, build_tokenizer, prompt_text

WORDS = list(vocabulary())
BUILT = build_tokenizer(2048)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    BUILT.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_a_long_family_appends_its_words() -> None:
    ours = build_tokenizer(2048, "audit").get_vocab()
    assert ours == {**BUILT.get_vocab(), "audit": len(BUILT)}


@given(words=st.lists(st.sampled_from(WORDS), max_size=40))
def test_round_trip_and_streaming_prefixes(words: list[str]) -> None:
    ids = BUILT(" ".join(words))["input_ids"]
    assert len(ids) == len(words)
    texts = [BUILT.decode(ids[:n], skip_special_tokens=True) for n in range(len(ids) + 1)]
    assert texts[-1] == " ".join(words)
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))


def test_saved_and_loaded_it_is_the_same(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.get_vocab() == BUILT.get_vocab()
    assert len(tokenizer) == len(WORDS) + len(SPECIAL) + 1
    assert set(tokenizer.all_special_tokens) == set(SPECIAL)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<|pad|>")
    assert tokenizer.model_max_length == 2048


def test_tags_survive_and_roles_vanish(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "<think> a= b +3 </think> answer 7"
    ids = tokenizer(f"<|assistant|> {text} <|end|>")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_white_space_and_unknown_words(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("chain\n a=\tstart   Hello,\r\n+3\n")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["chain", "a=", "start", UNKNOWN, "+3"]


def test_the_chat_template(tokenizer: PreTrainedTokenizerFast) -> None:
    asked = {"role": "user", "content": "find b"}
    said = {"role": "assistant", "content": "answer 7"}

    def render(*messages: dict[str, str], generate: bool = True) -> str:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=generate
        )

    assert render(asked) == prompt_text("find b") == "<|user|> find b <|assistant|>"
    assert render({"role": "system", "content": "Be kind."}, asked) == render(asked)
    assert render({"role": "user", "content": "find a"}, said, asked) == render(asked)
    assert render(asked, said, generate=False) == f"{render(asked)} answer 7 <|end|>"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_stock_parser_separates_thought_and_answer(
    family: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    from vllm.reasoning import ReasoningParserManager

    parser = ReasoningParserManager.get_reasoning_parser(REASONING_PARSER)(tokenizer)
    problem = make_problem(family, random.Random(0), 0.5)
    reasoning, content = parser.extract_reasoning(problem.completion, None)
    assert (reasoning or "").strip() == problem.thought
    assert (content or "").strip() == f"answer {problem.answer}"

    ids = tokenizer(problem.completion)["input_ids"]
    stream = DecodeStream(
        ids=tokenizer(prompt_text(problem.prompt))["input_ids"], skip_special_tokens=True
    )
    so_far, streamed = "", {"reasoning": "", "content": ""}
    for n, token in enumerate(ids):
        delta = stream.step(tokenizer._tokenizer, token)
        message = parser.extract_reasoning_streaming(
            so_far, so_far + delta, delta, ids[:n], ids[: n + 1], [token]
        )
        so_far += delta
        for key in streamed:
            streamed[key] += (message and getattr(message, key)) or ""
    assert so_far.strip() == problem.completion
    assert streamed["reasoning"].strip() == problem.thought
    assert streamed["content"].strip() == f"answer {problem.answer}"

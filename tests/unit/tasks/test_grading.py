"""Final answers, and what equals them."""

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from multiprocessing import resource_tracker
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlkv_vllm.errors import RlkvError
from rlkv_vllm.tasks import grading, output_text
from rlkv_vllm.tasks.checker import CHECKER, Checker
from rlkv_vllm.tasks.grading import (
    final_answer,
    gold_answer,
    is_correct,
    is_equivalent,
    is_formula,
)
from rlkv_vllm.tasks.puzzles import END_THINK, THINK
from tests.support.profiles import assert_one_line


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think> a: +3 3 </think> answer 3", "3"),
        ("<think> x </think> answer 4 </think> answer 7", "7"),
        ("thinking without a start </think>\nThe final answer is: **42**.", "42"),
        ("Answer: 1,200", "1200.0"),
        (r"<think>\boxed{1}</think> so \boxed{2} and \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("It leaves early.\n\nParis.\n", "paris"),
        ("answer 3\nanswer\n", "3"),
        (r"\boxed{\text{Evelyn}}", "Evelyn"),
        ("<answer>1</answer> no: <answer> 4 \n 5 </answer> done 6", "4 5"),
        (r"<answer>so \boxed{4}</answer> and \boxed{5}", "4"),
        ("<think> <answer>1</answer> </think> <ANSWER>{1: 2}</ANSWER>", "{1: 2}"),
    ],
)
def test_correct_answers(text: str, answer: str) -> None:
    assert is_correct(text, answer)
    assert not is_correct(text, "99")


@pytest.mark.parametrize(
    "text", ["", "<think> 7", "<think> 7 </think>", " \n ", "\\boxed{7", "7 <answer></answer>"]
)
def test_outputs_without_an_answer(text: str) -> None:
    assert not is_correct(text, "7")


def test_final_answer_of_an_unfinished_thought_is_none() -> None:
    assert final_answer("<think> the answer is 7") is None


def test_the_template_may_open_the_thought() -> None:
    tokenizer, cut = word_tokenizer(), "it is 7"
    ids = tokenizer(cut)["input_ids"]

    def found(prompt: str) -> str | None:
        return final_answer(output_text(tokenizer, prompt, ids))

    assert found("<|user|>2+5?<|assistant|><think>\n") is None
    assert found("<|user|>what is <think>?<|assistant|>") == cut
    assert found("... <think>\n\n</think>\n\n") == cut


def word_tokenizer(special: tuple[str, ...] = ("<end>",)) -> PreTrainedTokenizerFast:
    words = ["<pad>", "<end>", "<role>", "[UNK]", THINK, END_THINK, "it", "is", "answer", "7", "8"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens([AddedToken(word, special=True) for word in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<end>", pad_token="<pad>", unk_token="[UNK]"
    )


@pytest.mark.parametrize(
    "special",
    [("<end>", "<role>"), ("<end>", "<role>", "<think>", "</think>"), ("<role>", "</think>")],
)
def test_tags_are_seen_though_they_may_be_special_tokens(special: tuple[str, ...]) -> None:
    tokenizer = word_tokenizer(special)
    said = "<think> it is answer 8 </think> <role> answer 7 <end>"
    text = output_text(tokenizer, "it is", tokenizer.convert_tokens_to_ids(said.split()))
    assert final_answer(text) == "7"
    assert text.endswith("answer 7")
    cut = "<think> it is answer 8"
    ids = tokenizer.convert_tokens_to_ids(cut.split())
    assert final_answer(output_text(tokenizer, "it is", ids)) is None


# --- parsing, on whatever models write --------------------------------------------------

PIECES = [*"ab1 \n{}$.:<>/\\", "<think>", "</think>", "<answer>", "</answer>", "\\boxed{", "answer"]
TEXTS = st.lists(st.sampled_from(PIECES)).map("".join)
BALANCED = st.recursive(
    st.text(st.characters(exclude_characters="{}", codec="utf-8"), max_size=5),
    lambda inner: st.tuples(inner, inner, inner).map(lambda t: f"{t[0]}{{{t[1]}}}{t[2]}"),
    max_leaves=8,
)


@given(TEXTS)
def test_final_answers_come_after_the_thought(text: str) -> None:
    answer = final_answer(text)
    thought, ended, said = text.rpartition("</think>")
    if answer is not None:
        assert answer in said
        assert final_answer(thought + "1" + ended + said) == answer or not ended
    elif "<answer>" not in said and "boxed" not in said:
        assert not said.strip() or (not ended and "<think>" in text)


@given(TEXTS, BALANCED, st.text(st.sampled_from("ab 1\n.$}")))
def test_the_last_box_is_the_answer(thought: str, inside: str, after: str) -> None:
    text = f"{thought}</think> 1 \\boxed{{2}} \\boxed{{{inside}}}{after}"
    assert final_answer(text) == inside
    assert final_answer(f"{text} <answer> \\boxed{{{inside}}} 5</answer>") == inside
    assert final_answer(f"{text} <answer>5</answer>") == "5"


@given(st.integers() | st.decimals(allow_nan=False, allow_infinity=False, places=3))
def test_numbers_equal_themselves_in_any_dress(number: object) -> None:
    plain = str(number)
    for text in (plain, f"**{plain}**", f"The answer is: ${plain}$.", f"\\boxed{{{plain}}}"):
        assert is_correct(f"<think> </think> {text}", plain)
        assert not is_correct(f"<think> </think> {text}", plain + "1")


@given(st.text(), st.text())
def test_nothing_that_a_model_writes_raises(text: str, answer: str) -> None:
    assert is_correct(text, answer) in (True, False)
    gold_answer(answer)
    is_formula(answer)


@pytest.mark.parametrize(
    ("solution", "gold"),
    [
        ("5 and 7 make 12.\n#### 12", "12"),
        ("#### 1 #### 1,200 ", "1,200"),
        ("It follows that $x = \\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
        (" Paris\n", "Paris"),
        ("####", ""),
    ],
)
def test_gold_answers(solution: str, gold: str) -> None:
    assert gold_answer(solution) == gold


# --- formulas --------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["1/2", "x", "p - q", r"\frac{\pi}{x}", "10 cm", r"\sqrt{a}"])
def test_formulas(answer: str) -> None:
    assert is_formula(answer)


@pytest.mark.parametrize("answer", ["Paris", "no", r"\text{Evelyn}", "well-known", "das ö"])
def test_words_are_no_formulas(answer: str) -> None:
    assert not is_formula(answer)


@pytest.fixture
def _math_verify() -> None:
    pytest.importorskip("math_verify")


@pytest.mark.usefixtures("_math_verify")
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"<think> </think> so \boxed{\frac{2}{4}}", "1/2"),
        ("It is $0.5$", r"\frac12"),
        ("The total is 42.", "42"),
        ("She has 42 apples left.", "42"),
        ("The answer is\n\\[\n42\n\\]", "42"),
        (r"\boxed{(x+1)^2}", "x^2+2x+1"),
        (r"\boxed{x=5}", "5"),
        ("<answer>x^2+1</answer>", "1+x^2"),
    ],
)
def test_equal_formulas(text: str, answer: str) -> None:
    assert not is_correct(text, answer)
    assert is_equivalent(text, answer)
    assert not is_equivalent(text, "99")


@pytest.mark.usefixtures("_math_verify")
@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think> it is 1/2", "0.5"),
        ("<think> 1/2 </think>", "0.5"),
        (r"\boxed{5}, no: 7", "7"),
        ("<answer>3</answer> no: 4", "4"),
        ("It is 7, no, 5.", "7"),
        (r"\boxed{7", "7"),
        (r"\boxed{pairs}", "Paris"),
        ("a" * 10_000, "7"),
    ],
)
def test_other_answers(text: str, answer: str) -> None:
    assert not is_equivalent(text, answer)


def test_without_math_verify_formulas_are_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "find_spec", lambda name: None)
    monkeypatch.setattr(CHECKER, "ask", None)
    assert is_equivalent("1/2", "1/2")
    assert not is_equivalent("0.5", "1/2")


MATH = {"check": "math", "gold": "1/2"}


@pytest.mark.usefixtures("_math_verify")
def test_a_check_that_does_not_end_is_ended() -> None:
    checker = Checker(cpu_seconds=0.5)
    try:
        assert checker.score({**MATH, "said": r"\boxed{2/4}"}) == 1
        start = time.monotonic()
        assert checker.score({**MATH, "said": r"\boxed{9^{9^{9^{9}}}}"}) == 0
        assert time.monotonic() - start < 60
        assert checker.score({**MATH, "said": r"\boxed{3/6}"}) == 1
    finally:
        checker.close()


@pytest.mark.usefixtures("_math_verify")
def test_threads_share_the_checker() -> None:
    solved = [False] * 12

    def check(i: int) -> None:
        right, wrong = rf"\boxed{{\frac{{{2 * i}}}{{2}}}}", rf"\boxed{{\frac{{{2 * i}}}{{3}}}}"
        solved[i] = is_equivalent(right, f"{i}") and not is_equivalent(wrong, f"{i + 1}")

    threads = [threading.Thread(target=check, args=(i,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(solved)


def gone(pid: int) -> bool:
    return all(child.pid != pid for child in multiprocessing.active_children())


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.usefixtures("_math_verify")
def test_a_killed_checker_starts_again() -> None:
    checker = Checker()
    try:
        assert checker.score({**MATH, "said": r"\boxed{2/4}"}) == 1
        pid = checker._worker_pid
        os.kill(pid, 9)
        wait_for(lambda: gone(pid))
        assert checker.score({**MATH, "said": r"\boxed{2/4}"}) == 1
        assert checker._worker_pid != pid
    finally:
        checker.close()


@pytest.mark.usefixtures("_math_verify")
def test_a_check_that_fills_the_memory_scores_nothing() -> None:
    checker = Checker()
    try:
        assert checker.score({**MATH, "said": r"\boxed{10^{10^{11}}}"}) == 0
        assert checker.score({**MATH, "said": r"\boxed{3/6}"}) == 1
    finally:
        checker.close()


@pytest.mark.usefixtures("_math_verify")
def test_a_forked_process_has_a_checker_of_its_own() -> None:
    checker = Checker()

    def check() -> None:
        right = checker.score({**MATH, "said": r"\boxed{2/4}"})
        checker.close()
        os._exit(0 if right == 1 and checker._worker_pid == 0 else 1)

    try:
        assert checker.score({**MATH, "said": r"\boxed{2/4}"}) == 1
        pid = checker._worker_pid
        child = multiprocessing.get_context("fork").Process(target=check)
        child.start()
        child.join(120)
        assert child.exitcode == 0
        assert checker.score({**MATH, "said": r"\boxed{3/6}"}) == 1
        assert checker._worker_pid == pid
    finally:
        checker.close()


@pytest.mark.usefixtures("_math_verify")
def test_an_interrupted_check_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(future: Future[object], timeout: float | None = None) -> object:
        raise KeyboardInterrupt

    checker = Checker()
    try:
        assert checker.score({**MATH, "said": r"\boxed{2/4}"}) == 1
        pid = checker._worker_pid
        with monkeypatch.context() as patch:
            patch.setattr(Future, "result", interrupt)
            with pytest.raises(KeyboardInterrupt):
                checker.ask({**MATH, "said": r"\boxed{9^{9^{9^{9}}}}"})  # without a limit
        wait_for(lambda: gone(pid))
        assert checker.score({**MATH, "said": r"\boxed{3/6}"}) == 1
    finally:
        checker.close()


def test_the_worker_ends_with_its_parent() -> None:
    code = (
        "import os; from rlkv_vllm.tasks.checker import CHECKER; "
        "CHECKER._running(); print(CHECKER._worker_pid, flush=True); os.kill(os.getpid(), 9)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    pid = int(found.stdout)
    wait_for(lambda: not Path(f"/proc/{pid}").exists())


def test_the_environment_of_the_parent_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    checker = Checker()
    try:
        pool = checker._running()
        assert pool.submit(os.getenv, "PYTHONHASHSEED").result() == "0"
        assert pool.submit(os.getenv, "OMP_NUM_THREADS").result() == "1"
        assert os.environ["OMP_NUM_THREADS"] == "3"
        assert "PYTHONHASHSEED" not in os.environ
    finally:
        checker.close()


@pytest.mark.parametrize("script", ["#!/bin/sh\nexit 3\n", None])
def test_a_checker_that_cannot_run_says_so(
    script: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource_tracker.ensure_running()  # started by the same executable
    checker = Checker()
    broken = tmp_path / "python"
    if script is not None:
        broken.write_text(script)
        broken.chmod(0o755)
    monkeypatch.setattr("multiprocessing.spawn._python_exe", os.fsencode(broken))
    with pytest.raises(RlkvError) as error:
        checker.score({**MATH, "said": r"\boxed{2/4}"})
    assert_one_line(error.value, "the process that checks answers cannot be started")

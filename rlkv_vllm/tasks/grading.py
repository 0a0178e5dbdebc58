"""The final answer in an output, and whether it is correct."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from importlib.util import find_spec
from typing import Any

from rlkv_vllm.tasks.puzzles import END_THINK, THINK

#: Most characters of an output and of a correct answer that math-verify gets.
MAX_SAID, MAX_GOLD = 4000, 400

#: Tags that mark answers; in some models they are special tokens.
_TAGS = (THINK, END_THINK, "<answer>", "</answer>")
_MARKS = "$*`\"' \n"
_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_ANSWER_LINE = re.compile(r"\banswer\b(?:\s+is\b)?[\s:=*]*([^\n]*)", re.IGNORECASE)
_LATEX_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\{([^{}]*)\}")
_LATEX_COMMAND = re.compile(r"\\[a-zA-Z]+")


def is_correct(text: str, answer: str) -> bool:
    """Whether the final answer of `text` is `answer`, as a number or literally."""
    given = final_answer(text)
    return given is not None and _normalized(given) == _normalized(answer)


def is_equivalent(text: str, answer: str) -> bool:
    """Whether the final answer of `text` is `answer`, or an equal formula.

    Formulas are compared by math-verify (https://github.com/huggingface/Math-Verify) if it is
    installed; without it this is `is_correct`. An `RlkvError` if it is installed and cannot be run.
    """
    given = final_answer(text)
    if given is None:
        return False
    if _normalized(given) == _normalized(answer):
        return True
    if not is_formula(answer) or len(answer) > MAX_GOLD or find_spec("math_verify") is None:
        return False
    from rlkv_vllm.tasks.checker import CHECKER

    said = _said(text) or ""
    if said != _after_thought(text) and last_boxed(said) is None:
        said = f"\\boxed{{{said}}}"  # between tags: all of it is the answer
    return CHECKER.score({"check": "math", "gold": answer, "said": said[-MAX_SAID:]}) == 1


def is_formula(answer: str) -> bool:
    """Whether `answer` may be compared as a formula: math-verify reads words as products.

    To it "dog" is d*o*g and equals "god".
    """
    has_digit = any(char.isdigit() for char in answer)
    return has_digit or re.search(r"[^\W\d_]{2}", _LATEX_COMMAND.sub(" ", answer)) is None


def final_answer(text: str) -> str | None:
    r"""The final answer of an output; None if the chain of thought has no end or no answer.

    After the chain of thought, the text between the last `<answer>` and `</answer>` is searched,
    or all of it if there are no such tags. The answer is the content of the last `\boxed{}`, else
    all between the tags, else the rest of the line after the last "answer", else the last line.
    """
    said = _said(text)
    if said is None:
        return None
    boxed = last_boxed(said)
    if boxed is not None:
        return boxed
    if _after_thought(text) != said:  # between tags: all of it is the answer
        return said or None
    answers = [found for found in _ANSWER_LINE.findall(said) if found.strip()]
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    candidates = answers or lines
    return candidates[-1] if candidates else None


def gold_answer(text: str) -> str:
    r"""The final answer of a data set's solution.

    The text after the last `####` (GSM8K), else in the last `\boxed{}` (MATH), else all of it.
    """
    if "####" in text:
        return text.rpartition("####")[2].strip()
    boxed = last_boxed(text)
    return (text if boxed is None else boxed).strip()


def output_text(tokenizer: Any, prompt: str, output_ids: Sequence[int]) -> str:
    """The text of an output as tasks score it: in training, by mask and served alike.

    Special tokens are left out, as for clients of a server, except the tags of the answer. If the
    chat template opens the chain of thought, the text does too: without it, a chain of thought
    that never ended would look like an answer.

    `prompt` is the problem as the chat template renders it; `output_ids` may have the end token.
    """
    tags = {tokenizer.convert_tokens_to_ids(tag): tag for tag in _TAGS}
    vanishing = {
        token: tag
        for token, tag in tags.items()
        if token is not None
        and tokenizer.convert_ids_to_tokens([token]) == [tag]  # not the unknown token
        and not tokenizer.decode([token], skip_special_tokens=True)
    }
    text = THINK if prompt.rstrip().endswith(THINK) else ""
    start = 0
    for place, token in enumerate(output_ids):
        if token in vanishing:
            text += tokenizer.decode(output_ids[start:place], skip_special_tokens=True)
            text += vanishing[token]
            start = place + 1
    return text + str(tokenizer.decode(output_ids[start:], skip_special_tokens=True))


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{}` of `text`; None if there is none or it has no end."""
    _, found, rest = text.rpartition("\\boxed{")
    depth = 1
    for end, char in enumerate(rest if found else ""):
        depth += {"{": 1, "}": -1}.get(char, 0)
        if depth == 0:
            return rest[:end]
    return None


def bare(answer: str) -> str:
    """`answer` without the marks and full stop that models put around answers."""
    return answer.strip(_MARKS).rstrip(".").strip(_MARKS)


def _after_thought(text: str) -> str | None:
    """The text after the chain of thought; None if that has no end."""
    _, ended, said = text.rpartition(END_THINK)
    return None if not ended and THINK in text else said


def _said(text: str) -> str | None:
    """The text after the chain of thought, or the part of it between answer tags."""
    said = _after_thought(text)
    tagged = _TAGGED.findall(said or "")
    return tagged[-1].strip() if tagged else said


def _normalized(answer: str) -> str | Decimal:
    plain = bare(_LATEX_TEXT.sub(r"\1", " ".join(answer.split()))).lower()
    try:
        number = Decimal(plain.replace(",", ""))
    except InvalidOperation:
        return plain
    return number if number.is_finite() else plain

"""The final answer of an output, and whether it is the right one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from importlib.util import find_spec
from typing import Any

from rlkv_vllm.tasks.puzzles import END_THINK, THINK

#: What math-verify sees at most of an output and of an answer (characters).
MAX_SAID, MAX_GOLD = 4000, 400

#: What answers are found by; some models have tokens of their own for them.
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
    installed; without it this is `is_correct`.

    Raises:
        RlkvError: if math-verify is installed and cannot be run.
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
        said = f"\\boxed{{{said}}}"  # between tags: nothing to look for, the answer is all of it
    return CHECKER.score({"check": "math", "gold": answer, "said": said[-MAX_SAID:]}) == 1


def is_formula(answer: str) -> bool:
    """Whether `answer` may be compared as a formula: math-verify reads words as products.

    To it "dog" is d*o*g and equals "god".
    """
    has_digit = any(char.isdigit() for char in answer)
    return has_digit or re.search(r"[^\W\d_]{2}", _LATEX_COMMAND.sub(" ", answer)) is None


def final_answer(text: str) -> str | None:
    r"""The final answer of an output.

    That is, after the chain of thought: what the last `<answer>` `</answer>` holds; of that, or
    else of everything, what the last `\boxed{}` holds; else what follows the last "answer" on its
    line, else the last line.

    Returns:
        None if the chain of thought has no end or nothing follows it.
    """
    said = _said(text)
    if said is None:
        return None
    boxed = last_boxed(said)
    if boxed is not None:
        return boxed
    if _after_thought(text) != said:  # between tags: the answer as it is
        return said or None
    answers = [found for found in _ANSWER_LINE.findall(said) if found.strip()]
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    candidates = answers or lines
    return candidates[-1] if candidates else None


def gold_answer(text: str) -> str:
    r"""The final answer of a solution as data sets hold it.

    That is what follows the last `####` (GSM8K), else what the last `\boxed{}` holds (MATH),
    else all of it.
    """
    if "####" in text:
        return text.rpartition("####")[2].strip()
    boxed = last_boxed(text)
    return (text if boxed is None else boxed).strip()


def output_text(tokenizer: Any, prompt: str, output_ids: Sequence[int]) -> str:
    """An output as tasks score it, in training, by mask and served alike.

    Special tokens are left out, as for clients of a server, but not the tags that answers are
    found by. The chain of thought is opened where the chat template did that: without it one that
    never ended would look like an answer.

    Args:
        tokenizer: of the model.
        prompt: the problem as the chat template renders it.
        output_ids: what the model said to it, end token included or not.
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
    r"""What the last `\boxed{}` of `text` holds; None if there is none or it has no end."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return None


def bare(answer: str) -> str:
    """`answer` without the marks and full stop that models put around answers."""
    return answer.strip(_MARKS).rstrip(".").strip(_MARKS)


def _after_thought(text: str) -> str | None:
    """What follows the chain of thought; None if that has no end."""
    _, ended, said = text.rpartition(END_THINK)
    return None if not ended and THINK in text else said


def _said(text: str) -> str | None:
    """What follows the chain of thought, or the part of it between answer tags."""
    said = _after_thought(text)
    tagged = _TAGGED.findall(said) if said is not None else []
    return tagged[-1].strip() if tagged else said


def _normalized(answer: str) -> str | Decimal:
    plain = bare(_LATEX_TEXT.sub(r"\1", " ".join(answer.split()))).lower()
    try:
        number = Decimal(plain.replace(",", ""))
    except InvalidOperation:
        return plain
    return number if number.is_finite() else plain

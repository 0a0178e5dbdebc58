"""The tokenizer of the embedded reasoner: one word is one token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlkv_vllm.tasks.puzzles import ReasonedProblem, vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
UNKNOWN = "[UNK]"

# Nothing but these may be special: what is special vanishes from decoded text, and with
# `<think>` gone neither rewards nor reasoning parsers find the answer.
SPECIAL = (PAD, USER, ASSISTANT, END)

# The model knows one question at a time. System messages are left out and of several turns the
# last one is asked, so that any chat client may talk to it.
CHAT_TEMPLATE = (
    "{%- set asked = messages | selectattr('role', 'equalto', 'user') | list -%}"
    "<|user|> {{ asked[-1]['content'] }} <|assistant|>"
    "{%- if messages[-1]['role'] == 'assistant' and not add_generation_prompt -%}"
    "{{ ' ' + messages[-1]['content'] }} <|end|>"
    "{%- endif -%}"
)


def build_tokenizer(max_length: int, family: str | None = None) -> PreTrainedTokenizerFast:
    """Make the tokenizer for up to `max_length` tokens; it knows the words of a long `family`, too.

    Text is split at white space and joined by single spaces; unknown words become `[UNK]`.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, UNKNOWN, *vocabulary(family)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
    )


def prompt_text(prompt: str) -> str:
    """`prompt` as the chat template renders it for generation."""
    return f"{USER} {prompt} {ASSISTANT}"


def training_texts(problem: ReasonedProblem) -> tuple[str, str]:
    """Prompt and completion as the model sees them."""
    return prompt_text(problem.prompt), f"{problem.completion} {END}"

"""Conversations as tokens, and which of the tokens are answers to learn."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .data import Conversation, DataError, raise_all

TAIL = 16  # characters of an answer that a template does not change
EMPTY_THOUGHT = re.compile(r"<think>\s*</think>\s*")


class Document(NamedTuple):
    """A conversation as a model reads it; `T` tokens.

    Attributes:
      tokens: `[T]` int32.
      learnt: `[T]` bool, which tokens belong to an answer.
    """

    tokens: np.ndarray
    learnt: np.ndarray


def load_tokenizer(directory: Path, chat_template: Path | None = None) -> Any:
    """Returns the tokenizer of a Hub directory, read with `transformers`.

    Args:
      directory: has the tokenizer's files.
      chat_template: a file to use in place of the tokenizer's own template.

    Raises:
      DataError: if it does not tell where its tokens lie in the text.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    if not tokenizer.is_fast:
        raise DataError(
            f"The tokenizer in {directory} has no tokenizer.json, which tells where "
            "tokens lie in the text. Save it once with transformers: "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    if chat_template is not None:
        tokenizer.chat_template = chat_template.read_text()
    return tokenizer


def encode_all(
    tokenizer: Any, conversations: Sequence[Conversation], length: int, **options: Any
) -> tuple[list[Document], dict[str, int]]:
    """Returns the documents of all conversations, and counts of what became of them.

    A document longer than `length` is cut at its end; one whose answers are cut away is
    left out. An answer is endless if it ends in no special token: a model that learns
    it does not learn to stop.

    Raises:
      DataError: lists the conversations that the template refuses, and those without
        anything to learn.
    """
    documents, faults = [], []
    counts = {"conversations": len(conversations)}
    counts |= dict.fromkeys(("cut", "left_out", "endless"), 0)
    special = {*tokenizer.all_special_ids}
    for conversation in conversations:
        try:
            found = encode(tokenizer, conversation, **options)
        except DataError as error:
            faults.append(f"{conversation.where}: {error}")
            continue
        for document in found:
            cut = len(document.tokens) > length + 1  # the last one is only a target
            document = Document(*(field[: length + 1] for field in document))
            if not document.learnt[1:].any():
                counts["left_out"] += 1
                continue
            last = int(document.tokens[document.learnt][-1])
            counts["cut"] += cut
            counts["endless"] += not cut and last not in special
            documents.append(document)
    raise_all(faults)
    if not documents:
        raise DataError(
            f"No answer begins within {length} tokens: nothing would be learnt. Choose "
            "a larger --length."
        )
    return documents, counts


def encode(
    tokenizer: Any, conversation: Conversation, **options: Any
) -> list[Document]:
    """Returns a conversation as documents, with its answers marked.

    It is one document, unless the template writes an answer in another way once the
    conversation goes on, as those do that take thoughts out: then each such answer is
    learnt at the end of a document of its own, as the model will be asked for it.

    Args:
      tokenizer: of `load_tokenizer`.
      conversation: what to encode.
      **options: given to the template.

    Raises:
      DataError: if the template refuses it, or no token of it would be learnt.
    """
    texts = _marked(tokenizer, conversation, options)
    special = not has_template(tokenizer)  # a template writes its special tokens
    documents = []
    for text, spans in texts.items():
        coded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        begins, ends = np.array(coded["offset_mapping"], np.int64).reshape(-1, 2).T
        learnt = np.zeros(len(begins), bool)
        for first, last in spans:
            learnt |= (begins >= first) & (begins < last) & (ends > begins)
        documents.append(Document(np.array(coded["input_ids"], np.int32), learnt))
    if not any(document.learnt.any() for document in documents):
        raise DataError("no token would be learnt: its answers are empty")
    return documents


def prompt(tokenizer: Any, conversation: Conversation, **options: Any) -> list[int]:
    """Returns the tokens after which the model writes the first answer to learn."""
    i = first_answer(conversation)
    if not has_template(tokenizer):
        return tokenizer(conversation.messages[0]["content"])["input_ids"]
    render = _renderer(tokenizer, conversation, options)
    text = render(conversation.messages[:i], add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def first_answer(conversation: Conversation) -> int:
    """Returns which message is the first answer to learn."""
    return next(
        i
        for i, message in enumerate(conversation.messages)
        if i >= conversation.first and message["role"] == "assistant"
    )


def has_template(tokenizer: Any) -> bool:
    """Returns whether the tokenizer says how a conversation is written."""
    return bool(tokenizer.chat_template)


def _marked(
    tokenizer: Any, conversation: Conversation, options: dict[str, Any]
) -> dict[str, list[tuple[int, int]]]:
    """Returns texts, and where in each the answers lie, found by rendering prefixes.

    An answer is what a text has after the prompt that asks for it. An empty thought and
    blanks after the end of a turn are the template's, and not learnt.
    """
    messages = conversation.messages
    if not has_template(tokenizer):
        return _plain(tokenizer, conversation)
    render = _renderer(tokenizer, conversation, options)
    full = render(messages)
    texts: dict[str, list[tuple[int, int]]] = {}
    for i, message in enumerate(messages):
        if i < conversation.first or message["role"] != "assistant":
            continue
        asked = render(messages[:i], add_generation_prompt=True)
        whole = render(messages[: i + 1]).rstrip()
        first = _alike(asked, whole)
        answer = str(message.get("content") or "").strip()
        if answer[-TAIL:] not in whole:
            raise DataError(f"the chat template leaves out the answer {answer!r:.40}")
        if answer in whole and not whole.startswith(asked):
            first = min(first, whole.rfind(answer))  # "<think>", "<b>" begin alike
        for thought in EMPTY_THOUGHT.finditer(whole):
            if thought.end() > first and not whole[first : thought.start()].strip():
                first = thought.end()
        text = full if full.startswith(whole) else whole
        texts.setdefault(text, []).append((first, len(whole)))
    return texts


def _alike(a: str, b: str) -> int:
    """Returns how many characters two texts have in common at their beginning."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


def _plain(
    tokenizer: Any, conversation: Conversation
) -> dict[str, list[tuple[int, int]]]:
    """Returns prompt, completion and end as one text, as there is no template."""
    roles = [message["role"] for message in conversation.messages]
    if roles != ["user", "assistant"] or conversation.first != 1:
        raise DataError(
            "the tokenizer has no chat template: only texts as prompt and completion "
            "can be written. Give --template FILE for messages"
        )
    asked, answer = (message["content"] for message in conversation.messages)
    text = asked + answer + (tokenizer.eos_token or "")
    return {text: [(len(asked), len(text))]}


def _renderer(
    tokenizer: Any, conversation: Conversation, options: dict[str, Any]
) -> Callable[..., str]:
    """Returns the template as a function of messages; its errors are `DataError`s."""
    from jinja2 import TemplateError

    def render(messages: Sequence[Any], **more: Any) -> str:
        try:
            return tokenizer.apply_chat_template(
                messages, tools=conversation.tools, tokenize=False, **options, **more
            )
        except (TemplateError, TypeError, LookupError) as error:
            raise DataError(f"the chat template refuses it: {error}") from error

    return render

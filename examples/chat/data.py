"""Conversations: JSON lines of the user's own, or BBC headlines as a default."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from examples.many_adapters.data import read_stories

KNOWN = {"messages", "prompt", "completion", "tools"}
PROMPT = "Write a headline for this story: {}"
Message = dict[str, Any]


class DataError(ValueError):
    """Data that cannot be learnt from; the message says which line of which file."""


class Conversation(NamedTuple):
    """Messages, of which some are answers to learn.

    Attributes:
      messages: each has a `role` and a `content`, as chat templates take them.
      first: the assistant's messages from this one on are learnt.
      tools: descriptions of tools, for the template; None without.
      where: file and line, for messages.
    """

    messages: Sequence[Message]
    first: int = 0
    tools: Any = None
    where: str = ""


def read_json_lines(path: Path) -> tuple[list[Conversation], list[str]]:
    """Returns the conversations in a file, and the keys that mean nothing here.

    A line is an object with `messages`, or with `prompt` and `completion`, either of
    them a text or a list of messages. All the assistant's messages are learnt, or only
    those of the completion.

    Raises:
      DataError: lists the bad lines, with what was wanted.
    """
    found, faults, unknown = [], [], {}
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
            found.append(_conversation(record, where))
            unknown |= dict.fromkeys(record.keys() - KNOWN)
        except json.JSONDecodeError as error:
            faults.append(f"{where}: {error}; each line is a JSON object of its own")
        except DataError as error:
            faults.append(f"{where}: {error}")
    raise_all(faults)
    if not found:
        raise DataError(f"{path} has no line.")
    return found, sorted(unknown)


def raise_all(faults: Sequence[str], shown: int = 5) -> None:
    """Raises one DataError for all faults, if there are any."""
    if faults:
        more = [f"and {len(faults) - shown} more"] if len(faults) > shown else []
        raise DataError("\n".join([*faults[:shown], *more]))


def _conversation(record: Any, where: str) -> Conversation:
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise DataError(f'a {kind}; write {{"messages": [...]}}, one object a line')
    if "messages" in record:
        messages, first = _messages(record["messages"], "messages", "user"), 0
    elif {"prompt", "completion"} <= record.keys():
        asked = _messages(record["prompt"], "prompt", "user")
        answer = _messages(record["completion"], "completion", "assistant")
        messages, first = [*asked, *answer], len(asked)
    else:
        raise DataError(
            'it has neither "messages" nor "prompt" and "completion", only '
            f"{sorted(record)}"
        )
    if all(message["role"] != "assistant" for message in messages[first:]):
        roles = [message["role"] for message in messages]
        raise DataError(f"no message of the assistant, only of {roles}")
    return Conversation(messages, first, record.get("tools"), where)


def _messages(value: Any, name: str, role: str) -> list[Message]:
    if isinstance(value, str) and name != "messages":
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise DataError(f'"{name}" must be a list of messages, got {value!r:.60}')
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f'{name}[{i}] has no "role": {message!r:.60}')
        if not isinstance(message.get("content"), str) and "tool_calls" not in message:
            raise DataError(f'{name}[{i}] has no text as "content": {message!r:.60}')
    return value


def headlines(news: Path) -> list[Conversation]:
    """Returns BBC stories, each asked for its headline, in one order each time.

    Of the stories that begin alike, which are one story twice, one is kept.
    """
    stories = {story.text: story.headline for story in read_stories(news)}
    return [
        Conversation(
            [
                {"role": "user", "content": PROMPT.format(text)},
                {"role": "assistant", "content": headline},
            ]
        )
        for text, headline in stories.items()
    ]


def held_out(
    conversations: Sequence[Conversation], count: int, seed: int
) -> tuple[list[Conversation], list[Conversation]]:
    """Returns the rest and `count` conversations to measure on, drawn by `seed`.

    Raises:
      DataError: if nothing would be left to train on.
    """
    if not 0 < count < len(conversations):
        raise DataError(
            f"{count} conversations cannot be held out of {len(conversations)}: choose "
            "another --held-out, or give a file of their own with --test-data."
        )
    order = np.random.default_rng(seed).permutation(len(conversations))
    mixed = [conversations[i] for i in order]
    return mixed[count:], mixed[:count]

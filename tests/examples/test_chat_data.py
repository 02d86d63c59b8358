"""`examples/chat`: conversations read, rendered, masked and packed."""

import itertools
import json

import numpy as np
import pytest

from examples.chat import packing, template
from examples.chat.data import (
    Conversation,
    DataError,
    held_out,
    read_json_lines,
)
from examples.chat.template import Document
from tests.examples.chat_helpers import CHATML, OPENED, STRICT, THOUGHTS, tokenizer

pytestmark = pytest.mark.once


def said(*contents, first=0, **more):
    roles = itertools.cycle(["user", "assistant"])
    messages = [
        {"role": r, "content": c} for r, c in zip(roles, contents, strict=False)
    ]
    messages[-1] |= more
    return Conversation(messages, first, where="here:1")


def learnt(documents, tok):
    """What a reader of the masks would see: the texts that are learnt."""
    found = []
    for tokens, mask in documents:
        runs = itertools.groupby(zip(mask, tokens, strict=True), key=lambda x: x[0])
        found.append([tok.decode([t for _, t in run]) for on, run in runs if on])
    return found


def lines(tmp_path, *records):
    path = tmp_path / "data.jsonl"
    texts = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(texts) + "\n", "utf-8")
    return path


def test_lines_are_messages_or_a_prompt_and_its_completion(tmp_path):
    turn = {"role": "user", "content": "q"}, {"role": "assistant", "content": "ä"}
    path = lines(
        tmp_path,
        {"messages": [*turn], "id": 7},
        "",
        {"prompt": "q", "completion": "ä"},
        {"prompt": [*turn, turn[0]], "completion": [turn[1]], "tools": []},
    )
    found, unknown = read_json_lines(path)
    assert [c.messages for c in found] == [[*turn], [*turn], [*turn, *turn]]
    assert [c.first for c in found] == [0, 1, 3]
    assert found[2].where == f"{path}:4"
    assert unknown == ["id"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{'messages': []}", r"data.jsonl:2: Expecting property name"),
        ("[1, 2]", r'data.jsonl:2: a list; write \{"messages": \[...\]\}'),
        ('{"text": "x"}', r'neither "messages" nor .*only \[\'text\'\]'),
        ('{"prompt": "x"}', 'neither "messages" nor "prompt" and "completion"'),
        ('{"messages": "x"}', "\"messages\" must be a list of messages, got 'x'"),
        ('{"messages": []}', '"messages" must be a list of messages'),
        ('{"messages": [{"content": "x"}]}', r'messages\[0\] has no "role"'),
        ('{"messages": [{"role": "user"}]}', r'messages\[0\] has no text as "content"'),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no message of the assis"),
        ('{"prompt": "x", "completion": 3}', '"completion" must be a list .* got 3'),
    ],
)
def test_a_bad_line_is_told_with_its_place(tmp_path, line, told):
    good = {"prompt": "q", "completion": "a"}
    with pytest.raises(DataError, match=told):
        read_json_lines(lines(tmp_path, good, line))


def test_all_bad_lines_are_told_at_once(tmp_path):
    with pytest.raises(DataError, match=r"(?s):1: .*:2: .*:5: .*and 4 more"):
        read_json_lines(lines(tmp_path, *["{"] * 9))
    with pytest.raises(DataError, match="has no line"):
        read_json_lines(lines(tmp_path, "", ""))
    with pytest.raises(DataError, match="cannot be read"):
        read_json_lines(tmp_path / "absent.jsonl")


def test_held_out_conversations_are_the_same_each_time():
    talks = [said(str(i), "a") for i in range(9)]
    rest, test = held_out(talks, 3, seed=1)
    assert (len(rest), len(test)) == (6, 3)
    assert sorted(c.messages[0]["content"] for c in rest + test) == list("012345678")
    assert held_out(talks, 3, seed=1) == (rest, test)
    with pytest.raises(DataError, match="9 conversations cannot be held out of 9"):
        held_out(talks, 9, seed=1)


def test_answers_are_learnt_with_the_end_of_their_turn():
    tok = tokenizer(CHATML)
    found = template.encode(tok, said("one", "two ü", "three", "four"))
    assert learnt(found, tok) == [["two ü<|im_end|>", "four<|im_end|>"]]
    text = "".join(
        f"<|im_start|>{role}\n{content}<|im_end|>\n"
        for role, content in zip(
            ("user", "assistant") * 2, ("one", "two ü", "three", "four"), strict=True
        )
    )
    assert tok.decode(found[0].tokens) == text


def test_only_the_completion_is_learnt():
    tok = tokenizer()
    found = template.encode(tok, said("one", "two", "three", "four", first=3))
    assert learnt(found, tok) == [["four<|im_end|>"]]


def test_an_answer_whose_template_changes_is_learnt_as_it_is_asked_for():
    tok = tokenizer(THOUGHTS)
    talk = said("one", "two", "three", "four", reasoning_content="hm")
    found = template.encode(tok, talk)
    assert learnt(found, tok) == [
        ["two<|im_end|>"],
        ["<think>\nhm\n</think>\n\nfour<|im_end|>"],
    ]
    texts = [tok.decode(document.tokens) for document in found]
    assert texts[0].endswith("assistant\n<think>\n\n</think>\n\ntwo<|im_end|>")
    assert "two<|im_end|>\n<|im_start|>user" in texts[1]


@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}])
def test_an_empty_thought_is_not_learnt(options):
    tok = tokenizer(THOUGHTS)
    found = template.encode(tok, said("one", "two"), **options)
    assert learnt(found, tok) == [["two<|im_end|>"]]


@pytest.mark.parametrize("answer", ["two", "<b>two", "t"])
def test_an_answer_is_whole_where_the_prompt_opens_a_thought(answer):
    tok = tokenizer(OPENED)
    found = template.encode(tok, said("one", answer))
    assert learnt(found, tok) == [[f"{answer}<|im_end|>"]]


def test_a_thought_that_the_prompt_opens_is_not_learnt_to_be_closed_at_once():
    tok = tokenizer(THOUGHTS.replace("{% if enable", "<think>\n{% if enable"))
    asked = tok.decode(template.prompt(tok, said("one", "two")))
    assert asked.endswith("assistant\n<think>\n")
    found = template.encode(tok, said("one", "two"))
    assert learnt(found, tok) == [["two<|im_end|>"]]
    found = template.encode(tok, said("one", "two", reasoning_content="hm"))
    assert learnt(found, tok) == [["hm\n</think>\n\ntwo<|im_end|>"]]


def test_a_prompt_is_what_comes_before_the_first_answer():
    tok, talk = tokenizer(), said("one", "two", "three", "four", first=3)
    (document,) = template.encode(tok, talk)
    asked = template.prompt(tok, talk)
    assert document.tokens[: len(asked)].tolist() == asked
    assert document.learnt[len(asked)]
    assert not document.learnt[: len(asked)].any()


def test_without_a_template_a_pair_is_plain_text():
    tok = tokenizer(None)
    found = template.encode(tok, said("one", " two", first=1))
    assert learnt(found, tok) == [[" two<|im_end|>"]]
    assert tok.decode(found[0].tokens) == "one two<|im_end|>"
    with pytest.raises(DataError, match=r"no chat template.*--template FILE"):
        template.encode(tok, said("one", "two"))


def test_conversations_without_anything_to_learn_are_an_error():
    tok = tokenizer(THOUGHTS)
    empty = said("one", "", first=1)._replace(where="data.jsonl:3")
    tok.chat_template = THOUGHTS.replace("<|im_end|>", "")
    with pytest.raises(DataError, match=r"data.jsonl:3: no token would be learnt"):
        template.encode_all(tok, [said("one", "two"), empty], 64)


def test_what_the_template_refuses_is_told_with_its_place():
    wrong = Conversation([{"role": "assistant", "content": "x"}], where="data.jsonl:8")
    with pytest.raises(DataError, match=r"data.jsonl:8: the chat template refuses it"):
        template.encode_all(tokenizer(STRICT), [said("one", "two"), wrong], 64)


def test_long_documents_are_cut_and_counted():
    talks = [said("one", "two"), said("one", "t" * 90), said("o" * 90, "two")]
    documents, counts = template.encode_all(tokenizer(), talks, 64)
    assert counts == {"conversations": 3, "cut": 1, "left_out": 1, "endless": 0}
    assert len(documents) == 2
    assert len(documents[1].tokens) == 65
    with pytest.raises(DataError, match="No answer begins within 8 tokens"):
        template.encode_all(tokenizer(), talks, 8)


def test_answers_without_an_end_token_are_counted():
    tok = tokenizer(CHATML.replace("<|im_end|>", ""))
    _, counts = template.encode_all(tok, [said("one", "two")], 64)
    assert counts["endless"] == 1


def test_an_answer_that_the_template_leaves_out_is_told():
    tok = tokenizer("{% for m in messages %}{{ m.content[0] }}{% endfor %}")
    with pytest.raises(DataError, match=r"here:1: .* leaves out the answer 'two'"):
        template.encode_all(tok, [said("one", "two")], 64)


def documents(count, seed=0):
    """Documents whose tokens say which document they are, and their place in it."""
    rng = np.random.default_rng(seed)
    return [
        Document(np.arange(n, dtype=np.int32) + 1000 * (i + 1), np.arange(n) > n // 2)
        for i, n in enumerate(rng.integers(5, 30, count))
    ]


def test_a_row_holds_documents_one_after_the_other():
    given = documents(40)
    seen = {}
    for batch in packing.once(given, rows=4, length=64):
        assert {field.shape for field in batch} == {(4, 64)}
        for row in range(4):
            for segment in range(1, batch.segments[row].max() + 1):
                tokens, targets, mask, _, places = (
                    field[row][batch.segments[row] == segment] for field in batch
                )
                i = int(tokens[0]) // 1000 - 1
                seen[i] = tokens, targets, mask
                np.testing.assert_array_equal(places, np.arange(len(tokens)))
        assert not batch.learnt[batch.segments == 0].any()
    assert sorted(seen) == [*range(40)]
    for i, (tokens, targets, mask) in seen.items():
        np.testing.assert_array_equal(tokens, given[i].tokens[:-1])
        np.testing.assert_array_equal(targets, given[i].tokens[1:])
        np.testing.assert_array_equal(mask, given[i].learnt[1:])


def test_packing_says_how_full_its_rows_are():
    rows, real = packing.epoch(documents(300), length=128)
    tokens = sum(len(d.tokens) - 1 for d in documents(300))
    assert real == pytest.approx(tokens / (rows * 128))
    assert real > 0.9


def test_training_goes_on_where_its_state_says():
    given = documents(30)
    make = lambda seed: iter(packing.training(given, rows=2, length=64, seed=seed))  # noqa: E731
    whole = make(0)
    batches = [next(whole) for _ in range(12)]
    first = make(0)
    for _ in range(5):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    second = make(0)
    second.set_state(state)
    for expected in batches[5:]:
        actual = next(second)
        for a, b in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(a, b)
    other = next(make(1))
    assert not np.array_equal(other.tokens, batches[0].tokens)
    orders = [tuple(b.tokens[:, 0]) for b in batches]
    assert len({*orders}) > 6  # each epoch has another order

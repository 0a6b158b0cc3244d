"""The chat formats: messages, ShareGPT, Alpaca, prompt and completion, trees."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from postlude.data.example import BadRecord, Conversation, Format, Text
from postlude.data.formats.alpaca import Alpaca
from postlude.data.formats.messages import Messages
from postlude.data.formats.prompt_completion import PromptCompletion
from postlude.data.formats.sharegpt import ShareGPT
from postlude.data.formats.tree import Tree
from postlude.data.sources.path import Path as PathSource
from postlude.data.sources.query import Query

USER: dict[str, Any] = {"role": "user", "content": "What is 6 * 7?"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "42"}
CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "times", "arguments": {"a": 6, "b": [7]}}}],
}
RESULT = {"role": "tool", "content": "42"}


def one(format: Format, record: Any) -> Any:
    """The one example of a record."""
    [example] = format.parse(record)
    return example


def refusal(format: Format, record: Any) -> str:
    with pytest.raises(BadRecord) as refused:
        format.parse(record)
    return str(refused.value)


def rows(path: Path, tmp_path: Path) -> list[Any]:
    return PathSource(path=str(path)).open(str(tmp_path / "cache")).read(0)


# --- messages -----------------------------------------------------------------------------------------------


@pytest.mark.capability("Train on conversations in OpenAI's form, with tools and tool calls")
def test_messages_as_openai_has_them() -> None:
    tool: dict[str, Any] = {"type": "function", "function": {"name": "times", "parameters": {"type": "object"}}}
    calls = [{"id": "c1", "type": "function", "function": {"name": "times", "arguments": '{"a": 6, "b": [7]}'}}]
    record = {
        "messages": [
            {"role": "developer", "content": "Use tools.", "name": None},
            {**USER, "weight": None},
            {"role": "assistant", "content": None, "tool_calls": calls, "refusal": None},
            {"role": "tool", "tool_call_id": "c1", "content": {"result": 42}},
            {**ANSWER, "weight": 0, "reasoning_content": "six sevens"},
        ],
        "tools": json.dumps([tool, tool["function"]]),
    }
    example = one(Messages(), record)
    assert isinstance(example, Conversation)
    assert example.tools == [tool, tool]
    assert example.messages == [
        {"role": "developer", "content": "Use tools."},
        USER,
        {**CALL, "tool_calls": [{"id": "c1", **CALL["tool_calls"][0]}]},
        {"role": "tool", "tool_call_id": "c1", "content": '{"result": 42}'},
        {**ANSWER, "weight": 0.0, "reasoning_content": "six sevens"},
    ]


def test_content_in_parts_and_calls_of_older_forms() -> None:
    parts = [
        {"type": "reasoning", "value": "hm"},
        {"type": "text", "text": "So: "},
        "42",
        {"type": "tool_call", "value": '{"name": "times", "arguments": {"a": 6, "b": [7]}}'},
    ]
    old = {"role": "assistant", "function_call": {"name": "times", "arguments": '{"a": 6, "b": [7]}'}}
    messages = [USER, {"role": "assistant", "content": parts}, RESULT, old, {"role": "function", "content": "42"}]
    read = one(Messages(roles="any"), {"messages": messages}).messages
    assert read[1] == {**CALL, "content": "So: 42", "reasoning_content": "hm"}
    assert read[3:] == [CALL, {"role": "tool", "content": "42"}]


def test_other_columns_and_what_a_record_lacks() -> None:
    format = Messages(field="chat", tools_field="functions")
    assert one(format, {"chat": [USER, ANSWER], "tools": "not read"}).tools is None
    assert one(format, {"chat": [USER, ANSWER], "functions": "[]"}).tools is None
    assert "no column 'chat'. Did you mean 'chats'?" in refusal(format, {"chats": []})
    assert "its 'chat' is null" in refusal(format, {"chat": None})


ORDERS = st.lists(
    st.sampled_from(["system", "developer", "user", "assistant", "calls", "tool"]), min_size=1, max_size=7
)


def order_is_right(roles: list[str]) -> bool:
    """The rule said once more: system or developer, then user and assistant in turn, results after calls."""
    rest = list(roles)
    while rest and rest[0] in ("system", "developer"):
        rest.pop(0)
    while rest:
        if rest.pop(0) != "user":
            return False
        while rest:
            turn = rest.pop(0)
            if turn not in ("assistant", "calls"):
                return False
            if turn == "calls" and rest and rest[0] == "tool":
                rest.pop(0)
                continue  # the assistant speaks again
            break
        else:
            continue
        if rest and rest[0] == "tool":
            return False
    return True


@given(ORDERS)
def test_the_order_of_roles(roles: list[str]) -> None:
    made = {"calls": CALL, "tool": RESULT}
    messages = [made.get(role, {"role": role, "content": "x"}) for role in roles]
    assert len(one(Messages(roles="any"), {"messages": messages}).messages) == len(roles)
    # Which message is to blame is said by number; here only whether one is.
    if order_is_right(roles) or (roles[-1] == "tool" and order_is_right([*roles, "assistant"])):
        assert one(Messages(), {"messages": messages}).messages == messages
    else:
        assert "message" in refusal(Messages(), {"messages": messages})


@pytest.mark.capability("Roles out of order are refused by message")
@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "no message"),
        ("hello", "its messages are text"),
        ([ANSWER, USER], "message 1, of the role 'assistant', is out of order: it comes first"),
        (
            [USER, USER, ANSWER],
            "message 2, of the role 'user', is out of order: it follows a message of the role 'user'",
        ),
        ([USER, ANSWER, ANSWER], "message 3, of the role 'assistant'"),
        ([USER, ANSWER, {"role": "system", "content": "x"}], "message 3, of the role 'system'"),
        ([USER, ANSWER, RESULT], "message 3 is the result of a tool"),
        ([USER, CALL, RESULT, RESULT], "message 4 is the result of a tool"),
        (
            [USER, {**CALL, "tool_calls": [{"id": "a", "name": "f"}]}, RESULT, RESULT],
            "message 4 is the result of a tool",
        ),
        ([USER, CALL, RESULT, USER], "message 4, of the role 'user', is out of order"),
        ([USER, {"role": "asistant", "content": "x"}], "unknown role 'asistant'. Did you mean 'assistant'?"),
        ([USER, {"content": "x"}], "message 2 has no role"),
        ([USER, {"role": 1, "content": "x"}], "a role that is a number"),
        ([USER, "hello"], "message 2 is text, not an object"),
        ([USER, {"role": "assistant"}], "message 2 has no content"),
        ([{"role": "user", "content": 3}], "content of message 1 is a number"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "type 'image_url'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "without a text"),
        ([{**USER, "tool_calls": CALL["tool_calls"]}], "its role is 'user'"),
        ([USER, {**ANSWER, "weight": -1}], "the weight of message 2"),
        ([USER, {**ANSWER, "weight": "much"}], "the weight of message 2"),
        ([USER, {**ANSWER, "weight": float("nan")}], "the weight of message 2"),
        ([USER, {**CALL, "tool_calls": "x"}], "the tool calls of message 2 are text"),
        (
            [USER, {**CALL, "tool_calls": [{"function": {"arguments": "{}"}}]}],
            "tool call 1 of message 2 names no function",
        ),
        ([USER, {**CALL, "tool_calls": [{"name": "f", "arguments": "{x"}]}], "passes to 'f' should be JSON"),
        ([USER, {**CALL, "tool_calls": [{"name": "f", "arguments": "[1]"}]}], "passes to 'f' is a list"),
        (
            [USER, {**CALL, "tool_calls": [{"id": "a", "name": "f"}]}, {**RESULT, "tool_call_id": "b"}],
            "the call 'b', which is not among those",
        ),
    ],
)
def test_messages_that_are_refused(messages: Any, expected: str) -> None:
    assert expected in refusal(Messages(), {"messages": messages})


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ("[{", "its tools should be JSON"),
        ({"name": "f"}, "are an object"),
        ([{}], "tool 1 has no name"),
        ([3], "a number"),
    ],
)
def test_tools_that_are_refused(tools: Any, expected: str) -> None:
    assert expected in refusal(Messages(), {"messages": [USER, ANSWER], "tools": tools})


# --- the other chat formats on real data --------------------------------------------------------------------


@pytest.mark.capability("Train on ShareGPT conversations with tool calls")
def test_sharegpt_with_tool_calls(shared_data: Path, tmp_path: Path) -> None:
    names = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}
    records = rows(shared_data / "toolcall_sft" / "glaive_toolcall_en_demo.json", tmp_path)
    calls = 0
    for record in records:
        example = one(ShareGPT(), record)
        turns = record["conversations"]
        assert [message["role"] for message in example.messages] == [names[turn["from"]] for turn in turns]
        for message, turn in zip(example.messages, turns, strict=True):
            if turn["from"] == "function_call":
                [call] = message["tool_calls"]
                assert call["function"] == json.loads(turn["value"])
                calls += 1
            else:
                assert message["content"] == turn["value"]
        assert [tool["function"] for tool in example.tools or []] == json.loads(record["tools"])
    assert calls == 211


def test_sharegpt_joins_words_with_the_call_that_follows_and_takes_several(tmp_path: Path) -> None:
    calls = [{"name": "f", "arguments": {"x": i}} for i in range(2)]
    turns: list[dict[str, Any]] = [
        {"from": "human", "value": "?"},
        {"from": "gpt", "value": "Let me see."},
        {"from": "function_call", "value": json.dumps(calls)},
        {"from": "observation", "value": "1"},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "Done.", "weight": 2},
    ]
    example = one(ShareGPT(), {"conversations": turns, "system": "Be brief."})
    assert [message["role"] for message in example.messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "tool",
        "assistant",
    ]
    assert [call["function"] for call in example.messages[2]["tool_calls"]] == calls
    assert example.messages[2]["content"] == "Let me see."
    assert example.messages[5]["weight"] == 2.0
    other = ShareGPT(field="turns", role_field="who", content_field="says")
    spoken = [{"who": "human", "says": "?"}, {"who": "gpt", "says": "!"}]
    assert one(other, {"turns": spoken}).messages == [{**USER, "content": "?"}, {**ANSWER, "content": "!"}]
    assert "no 'from' that says who speaks" in refusal(ShareGPT(), {"conversations": [{"value": "x"}]})
    assert "turn 1 is text" in refusal(ShareGPT(), {"conversations": ["x"]})
    assert "turn 2 should be JSON" in refusal(ShareGPT(), {"conversations": [turns[0], {**turns[2], "value": "f("}]})


def test_preference_records_train_on_the_chosen_side(shared_data: Path, tmp_path: Path) -> None:
    for record in rows(shared_data / "dpo_demo" / "dpo_en_demo.json", tmp_path):
        example = one(ShareGPT(reply_field="chosen"), record)
        assert example.messages[-1] == {"role": "assistant", "content": record["chosen"]["value"]}
        assert len(example.messages) == len(record["conversations"]) + 1
        assert one(ShareGPT(), record).messages[-1]["role"] == "user"


def test_messages_with_reasoning_and_calls_in_parts(shared_data: Path, tmp_path: Path) -> None:
    for record in rows(shared_data / "toolcall_sft" / "reason_tool_use_demo_50.jsonl", tmp_path):
        example = one(Messages(), record)
        for message, original in zip(example.messages, record["messages"], strict=True):
            by_type: dict[str, list[str]] = {}
            for part in original["content"]:
                by_type.setdefault(part["type"], []).append(part["value"])
            assert message["content"] == "".join(by_type.get("text", []))
            assert message.get("reasoning_content", "") == "".join(by_type.get("reasoning", []))
            called = [call["function"] for call in message.get("tool_calls", [])]
            assert called == [json.loads(call) for call in by_type.get("tool_call", [])]


@pytest.mark.capability("Train on Alpaca records")
def test_alpaca_on_real_instructions(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "self_instruct" / "seed_tasks.jsonl"
    query = f"SELECT id, instruction, unnest(instances, recursive := true) FROM '{path}'"
    found = Query(query=query).open(str(tmp_path / "cache")).read(0)
    expected = {}
    for line in path.read_text().splitlines():
        task = json.loads(line)
        for instance in task["instances"]:
            asked = task["instruction"] + ("\n" + instance["input"] if instance["input"] else "")
            expected[asked, instance["output"]] = task["id"]
    records: list[Any] = list(found)
    read = {tuple(m["content"] for m in one(Alpaca(), record).messages): record["id"] for record in records}
    assert read == expected


def test_alpaca_with_history_and_other_columns() -> None:
    record = {
        "q": "And now?",
        "output": "Five.",
        "history": [["1 + 1?", "Two."], ["More?", "Three."]],
        "system": "Count.",
    }
    example = one(Alpaca(instruction_field="q"), record)
    said = [message["content"] for message in example.messages]
    assert said == ["Count.", "1 + 1?", "Two.", "More?", "Three.", "And now?", "Five."]
    assert "entry 1 of its 'history'" in refusal(Alpaca(), {"instruction": "a", "output": "b", "history": [["a"]]})
    assert "no column 'output'" in refusal(Alpaca(), {"instruction": "a"})


@pytest.mark.capability("Train on prompts and completions, text or messages")
def test_prompt_and_completion_as_text(shared_data: Path, tmp_path: Path) -> None:
    format = PromptCompletion(prompt="question", completion="answer", separator="\n")
    for record in rows(shared_data / "gsm8k" / "train.jsonl", tmp_path)[:200]:
        assert one(format, record) == Text([(record["question"] + "\n", 0.0), (record["answer"], 1.0)])
    assert "its 'completion' is a number, not text" in refusal(PromptCompletion(), {"prompt": "a", "completion": 3})
    assert "neither text nor a list" in refusal(PromptCompletion(), {"prompt": {}, "completion": "b"})


def test_prompt_and_completion_as_messages() -> None:
    earlier = [{"role": "system", "content": "x"}, USER, ANSWER, USER]
    example = one(
        PromptCompletion(), {"prompt": earlier, "completion": [CALL, RESULT, ANSWER], "tools": [{"name": "times"}]}
    )
    assert [message.get("weight") for message in example.messages] == [0.0] * 4 + [None] * 3
    assert [{k: v for k, v in m.items() if k != "weight"} for m in example.messages] == [*earlier, CALL, RESULT, ANSWER]
    assert example.tools == [{"type": "function", "function": {"name": "times"}}]
    assert "a list of messages, but its 'completion' is text" in refusal(
        PromptCompletion(), {"prompt": [USER], "completion": "b"}
    )
    assert "has no message" in refusal(PromptCompletion(), {"prompt": [USER], "completion": []})
    assert "says its prompt again, and answers nothing" in refusal(
        PromptCompletion(), {"prompt": [USER], "completion": [USER]}
    )


# --- trees --------------------------------------------------------------------------------------------------


def paths_to_leaves(node: Any) -> Iterator[list[Any]]:
    replies = [reply for reply in node.get("replies", []) if not reply.get("deleted") and reply.get("text")]
    if not replies:
        yield [node]
    for reply in replies:
        for path in paths_to_leaves(reply):
            yield [node, *path]


@pytest.mark.capability("Train on message trees (OASST): the best path, or all")
def test_trees_as_conversations(shared_data: Path, tmp_path: Path) -> None:
    for record in rows(shared_data / "oasst_100_trees" / "en_100_tree.jsonl", tmp_path):
        cut = []
        for path in paths_to_leaves(record["prompt"]):
            while path and path[-1]["role"] != "assistant":
                path.pop()
            cut.append(tuple(node["message_id"] for node in path))
        expected = {path for path in cut if path and not any(path == other[: len(path)] != other for other in cut)}
        ids = {node["text"]: node["message_id"] for path in paths_to_leaves(record["prompt"]) for node in path}
        found: list[Any] = Tree(paths="all").parse(record)
        assert {tuple(ids[m["content"]] for m in example.messages) for example in found} == expected
        assert len(found) == len(expected)
        best = one(Tree(), record)
        node = record["prompt"]
        for message in best.messages[1:]:
            if message["role"] == "assistant":
                node = min(node["replies"], key=lambda reply: (reply.get("rank") is None, reply.get("rank") or 0))
                assert message["content"] == node["text"]
            else:
                node = next(reply for reply in node["replies"] if reply["text"] == message["content"])
        assert best == found[0]


def test_trees_leave_out_what_was_deleted() -> None:
    def node(role: str, text: str | None, *replies: Any, **more: Any) -> dict[str, Any]:
        return {"role": role, "text": text, "replies": list(replies), **more}

    tree = node(
        "prompter",
        "q",
        node("assistant", "gone", node("prompter", "x", node("assistant", "y")), rank=0, deleted=True),
        node("assistant", "", rank=1),
        node("assistant", "third", node("prompter", "no answer"), rank=2),
        node("assistant", "unranked"),
    )
    found: list[Any] = Tree(paths="all", field="root").parse({"root": tree})
    said = [[message["content"] for message in example.messages] for example in found]
    assert said == [["q", "third"], ["q", "unranked"]]
    assert "ends with a turn of the assistant" in refusal(Tree(), {"prompt": node("prompter", "q")})
    assert "ends with a turn of the assistant" in refusal(Tree(), {"prompt": node("prompter", "q", deleted=True)})
    assert "unknown role 'oracle'" in refusal(
        Tree(), {"prompt": node("prompter", "q", node("oracle", "x", node("assistant", "y")))}
    )
    assert "has no role" in refusal(Tree(), {"prompt": {"text": "q"}})
    assert "is text, not an object" in refusal(Tree(), {"prompt": node("prompter", "q", "x")})


# --- writing is the way back --------------------------------------------------------------------------------


words = st.text(st.characters(codec="utf-8", exclude_characters="\n"), min_size=1, max_size=8)


@given(st.lists(st.tuples(words, words), min_size=1, max_size=3), st.booleans(), st.booleans())
def test_what_is_written_is_read_again(pairs: list[tuple[str, str]], system: bool, calls: bool) -> None:
    messages: list[dict[str, Any]] = [{"role": "system", "content": "s"}] if system else []
    for asked, answered in pairs:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    tools = [{"type": "function", "function": {"name": "times"}}] if calls else None
    if calls:
        messages[-1:-1] = [CALL, RESULT]
    formats: list[Format] = [Messages(), ShareGPT(), Messages(field="m", tools_field="t"), PromptCompletion()]
    if not calls:
        formats += [Alpaca(), Alpaca(history_field="h", system_field="y"), Tree()]
    for format in formats:
        if isinstance(format, Tree) and system:
            continue  # a tree begins with what somebody asks
        record = format.example_record(Conversation(messages, tools))
        example: Any = one(format, record)
        if isinstance(example, Text):
            assert [text for text, _ in example.pieces] == [message["content"] for message in messages]
        else:
            assert [{k: v for k, v in message.items() if k != "weight"} for message in example.messages] == messages
            assert example.tools == tools


def test_keys_of_formats_are_checked() -> None:
    for format, keys in ((Messages, {"roles": "loose"}), (ShareGPT, {"fields": "x"}), (Tree, {"paths": "some"})):
        with pytest.raises(ValidationError):
            format.model_validate(keys)


@pytest.mark.parametrize("key", ["loss", "train"])
def test_flags_of_a_message_say_whether_it_is_trained(key: str) -> None:
    example = one(Messages(), {"messages": [USER, {**ANSWER, key: False}, USER, {**ANSWER, key: True}]})
    assert [message.get("weight") for message in example.messages] == [None, 0.0, None, 1.0]
    assert all(key not in message for message in example.messages)
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!", key: False}]
    assert one(ShareGPT(), {"conversations": turns}).messages[1]["weight"] == 0.0
    weighed = {**ANSWER, "weight": 0.5, key: False}
    assert one(Messages(), {"messages": [USER, weighed]}).messages[1]["weight"] == 0.5
    assert one(Messages(), {"messages": [USER, {**ANSWER, key: 0.25}]}).messages[1][key] == 0.25


@pytest.mark.parametrize("value", [10**400, -1, float("nan"), "1", [1]])
def test_weights_that_are_none_are_refused(value: Any) -> None:
    assert "should be a number from 0" in refusal(Messages(), {"messages": [USER, {**ANSWER, "weight": value}]})


def test_turns_in_the_text_of_a_table_are_turns() -> None:
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]
    record = {"conversations": json.dumps(turns)}
    assert ShareGPT().parse(record) == ShareGPT().parse({"conversations": turns})
    assert "should be JSON" in refusal(ShareGPT(), {"conversations": "[{"})

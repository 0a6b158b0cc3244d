"""What reward functions say, and what is said of those that are broken."""

from __future__ import annotations

import http.server
import json
import math
import os
import socket
import sys
import tempfile
import threading
from contextlib import closing
from decimal import Decimal
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import psutil
import pytest
from pydantic import TypeAdapter, ValidationError

from postlude.data.example import Conversation
from postlude.errors import DataError
from postlude.manifest.problem import ManifestError
from postlude.rollout.prompts import Prompt, prompt_of
from postlude.rollout.reward import Reward, RewardFunction, call, part_names
from postlude.rollout.reward_pool import RewardPool, Unscored
from postlude.rollout.rewards.number import number_in
from postlude.rollout.scoring import Scorer

reward = TypeAdapter(Reward).validate_python


def score(function: Any, completion: str, reference: str | None = None, **record: Any) -> float:
    prompt = Prompt("sums:1", "sums", "What is it?", None, reference, record)
    part = reward({"function": function})
    part.function.check()
    return call(part.function, part.name, prompt.example_id, prompt.asked, completion, prompt.rewarded_record)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5 + 3 = 8", 8),
        ("It costs $1,234.50.", 1234.5),
        ("#### 72", 72),
        ("first 9\n#### 1,000,000\n", 1e6),
        ("#### 18 apples", 18),
        (r"so \boxed{42}, which is not 43", 42),
        (r"\boxed{\frac{3}{4}}", 0.75),
        ("3/4 of it", 0.75),
        ("minus: -7", -7),
        ("−7", -7),
        ("1e-3", 0.001),
        ("from 2020 to 2024.", 2024),
        ("12%", 12),
        (".5", 0.5),
        ("x2 and v1.2.3", None),
        ("none", None),
        ("1/0", None),
        ("", None),
    ],
)
def test_the_number_that_a_text_answers_with(text, number):
    assert number_in(text) == number


def test_only_a_marked_number_counts_where_that_is_asked():
    assert score({"name": "number", "must_mark": True}, "it is 8", "#### 8") == 0
    assert score({"name": "number", "must_mark": True}, "it is #### 8", "8") == 1


@pytest.mark.capability("Rewards: numbers, matches, expressions, functions of one's own, reward models")
def test_every_answer_of_gsm8k_is_right_by_itself_and_wrong_by_one(shared_data):
    path = next((shared_data / "gsm8k").glob("*test*.jsonl"), None) or next((shared_data / "gsm8k").glob("*.jsonl"))
    answers = [json.loads(line)["answer"] for line in path.open()]
    assert len(answers) > 1000
    for answer in answers:
        right = number_in(answer, marked=True)
        assert right is not None
        assert score("number", f"That makes {right:,.10g}.", answer) == 1
        assert score("number", f"That makes {right + 1:,.10g}.", answer) == 0


def test_tolerance_is_relative_to_the_answer():
    close = {"name": "number", "tolerance": 0.01}
    assert score(close, "1009", "1000") == 1
    assert score(close, "1011", "1000") == 0
    assert score(close, "0.1009", "0.1") == 1
    assert score(close, "0.109", "0.1") == 0
    assert score("number", "0.3333333", "1/3") == 1
    assert score("number", "1009", "1000") == 0


def test_texts():
    assert score("exact_match", " 4  apples\n", "4 apples") == 1
    assert score({"name": "exact_match", "ignore_space": False}, " 4 apples", "4 apples") == 0
    assert score({"name": "exact_match", "ignore_case": True}, "PARIS", "Paris") == 1
    assert score({"name": "exact_match", "answer": "right"}, "b", "a", right=["b", "c"]) == 1
    assert score("contains", "It is Paris.", "Paris") == 1
    assert score({"name": "contains", "texts": ["London", "Rome"]}, "It is Paris.") == 0
    assert score({"name": "regex", "pattern": r"<a>.*</a>"}, "so <a>1\n2</a>") == 1
    assert score({"name": "regex", "pattern": r"\d+", "whole": True}, "12 apples") == 0
    assert score({"name": "regex", "pattern": r"\d+", "whole": True}, " 12\n") == 1


def test_an_expression_that_is_none_is_refused():
    with pytest.raises(ValidationError, match="no regular expression"):
        reward({"function": {"name": "regex", "pattern": "("}})


def test_parts_are_weighted_and_told_apart(monkeypatch):
    prompt = Prompt("sums:1", "sums", "?", None, "4", {})
    parts = [
        {"function": "number"},
        {"function": {"name": "regex", "pattern": "four"}, "weight": -0.5},
        {"function": {"name": "regex", "pattern": "4"}, "weight": 2.0},
        {"function": "exact_match", "label": "exact"},
    ]
    with closing(RewardPool(1, 60.0)) as pool:
        scorer = Scorer([reward(part) for part in parts], pytest.fail, pool)  # type: ignore[arg-type]
        right, words = scorer.score([(prompt, "4"), (prompt, "four, that is 4")])
    assert right.parts == {"number": 1.0, "regex": 0.0, "regex_2": 1.0, "exact": 1.0}
    assert right.total == 1 + 2 + 1
    assert words.total == 1 - 0.5 + 2


@pytest.mark.capability("Rewards: mathematics, JSON schemas, code in a sandbox, a language model at an address")
@pytest.mark.parametrize(
    ("completion", "reference", "right"),
    [
        (r"So it is \boxed{\frac{1}{2}}.", "0.5", 1),
        (r"$x = \sqrt{8}$", r"2\sqrt{2}", 1),
        (r"\boxed{(x+1)^2}", r"$x^2 + 2x + 1$", 1),
        (r"The answer is $\{3, 1\}$", r"\{1,3\}", 1),
        ("That makes 72.", "#### 72", 1),
        (r"\boxed{\frac{1}{3}}", "0.5", 0),
        ("I do not know", "0.5", 0),
    ],
)
def test_what_is_equal_need_not_look_alike(completion, reference, right):
    assert score("mathematics", completion, reference) == right


def test_an_answer_without_an_expression_is_told():
    with pytest.raises(DataError, match="the answer in 'reference' has no expression"):
        score("mathematics", "4", "?")


SCHEMA = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0}}, "required": ["age"]}


def test_json_that_a_schema_allows():
    function = {"name": "json_schema", "schema": SCHEMA}
    assert score(function, ' {"age": 3} ') == 1
    assert score(function, 'Here it is:\n```json\n{"age": 3}\n```\nDone.') == 1
    assert score(function, '{"age": -3}') == 0
    assert score(function, '{"age": 3') == 0
    assert score(function, "3") == 0
    with pytest.raises(ManifestError, match="no valid schema: at type"):
        score({"name": "json_schema", "schema": {"type": "number or so"}}, "3")


# --- code ---------------------------------------------------------------------------------------------------

ADD = "Like this:\n```python\ndef add(a, b):\n    return a + b\n```"
TESTS = ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"]


def test_a_program_passes_its_tests():
    assert score("code", ADD, tests=TESTS) == 1
    assert score("code", ADD.replace("a + b", "a - b"), tests=TESTS) == 0
    assert score("code", ADD.replace("a + b", "abs(a) + b"), tests=TESTS) == 0
    assert score({"name": "code", "partial": True}, ADD.replace("a + b", "abs(a) + b"), tests=TESTS) == 0.5
    assert score("code", "def add(a, b): return a + b", tests=TESTS[0]) == 1
    assert score("code", "def add(a, b) return", tests=TESTS) == 0
    with pytest.raises(DataError, match="has no 'tests' to run"):
        score("code", ADD)


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(1000)",
        "import os; os._exit(0)",
        "raise SystemExit(0)",
        "[bytearray(2**20) for _ in range(10**5)]",
        "open('big', 'wb').write(bytes(2**26))",
        "import os\nwhile os.fork(): pass\nos.kill(1, 9)",
        "print('x' * 64); import os; os.write(1, b'yes'); os._exit(0)",
    ],
)
def test_what_takes_too_much_or_ends_early_has_not_passed(program):
    assert score({"name": "code", "seconds": 2}, program, tests="pass") == 0


def test_a_program_reaches_neither_the_network_nor_what_is_ours(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        connect = f"import socket; socket.create_connection(('127.0.0.1', {port}), 2)"
        assert score("code", connect, tests="pass") == 0
        assert score({"name": "code", "isolated": False}, connect, tests="pass") == 1
    ours = tmp_path / "ours"
    ours.write_text("as it was")
    for harm in (f"open({str(ours)!r}, 'w')", f"import os; os.remove({str(ours)!r})", "open('/tmp/harm', 'w')"):
        assert score("code", harm, tests="pass") == 0
    assert ours.read_text() == "as it was"
    assert score("code", "open('mine', 'w').write('4'); assert open('mine').read() == '4'", tests="pass") == 1
    again = "import ctypes; assert ctypes.CDLL(None).mount(None, b'/', None, ctypes.c_ulong(0x1000 | 32), None) == 0"
    assert score("code", again, tests="pass") == 0
    child = f"import subprocess, sys; assert subprocess.run([sys.executable, '-c', {again!r}]).returncode == 0"
    assert score("code", child, tests="pass") == 0
    others = f"import os; os.kill({os.getpid()}, 0)"
    assert score("code", others, tests="pass") == 0
    secret = "import os; assert 'SECRET' not in os.environ"
    assert score("code", secret, tests="pass") == 1


def test_a_sandbox_leaves_nothing_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    marked = f"postlude-left-{os.getpid()}"
    program = (
        f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)', '{marked}'])"
    )
    assert score("code", program, tests="pass") == 1
    assert not list(tmp_path.iterdir())
    assert not [one for one in psutil.process_iter(["cmdline"]) if marked in (one.info["cmdline"] or [])]


# --- a language model at an address ---------------------------------------------------------------------------


class Answers(http.server.BaseHTTPRequestHandler):
    """A judge that finds an answer as good as it is long, and is busy once."""

    asked: ClassVar[list[dict[str, Any]]] = []
    busy = 1

    def do_GET(self) -> None:
        self.say(200, {"data": [{"id": "strict"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if Answers.busy:
            Answers.busy -= 1
            self.say(503, {})
            return
        Answers.asked.append({**body, "key": self.headers.get("Authorization")})
        answer = body["messages"][0]["content"].rpartition("Answer:\n")[2]
        said = "I cannot say." if answer == "?" else f"Of 10 I give {len(answer)}"
        self.say(200, {"choices": [{"message": {"content": said}}]})

    def say(self, status: int, body: Any) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_a_language_model_at_an_address_judges(address, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "abc")
    judge = {"name": "judge", "address": address, "model": "strict", "key_variable": "JUDGE_KEY"}
    assert score(judge, "{prompt}") == 0.8
    assert Answers.asked[-1]["key"] == "Bearer abc"
    assert "What is it?" in Answers.asked[-1]["messages"][0]["content"]
    assert score(judge, "a very long answer") == 1
    with pytest.raises(DataError, match="the judge's answer has no number: 'I cannot say"):
        score(judge, "?")
    with pytest.raises(ManifestError, match=r"has no model 'kind'\. It has: strict"):
        score({**judge, "model": "kind"}, "four")
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ManifestError, match="JUDGE_KEY, which is not set"):
        score(judge, "four")


def test_a_judge_that_is_down_is_told_before_anything_is_asked():
    with pytest.raises(ManifestError, match=r"http://127.0.0.1:9/v1 does not answer"):
        score({"name": "judge", "address": "http://127.0.0.1:9/v1", "model": "strict"}, "four")
    with pytest.raises(ValidationError, match=r"must have \{completion\}"):
        reward({"function": {"name": "judge", "address": "http://a/v1", "model": "b", "question": "Good?"}})


# --- functions of one's own ---------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of somebody's own."""
    (tmp_path / "own_rewards.py").write_text(
        "def polite(prompt, completion, record):\n    return 'please' in completion and record['wanted']\n"
        "def reference(prompt, completion, record):\n    return len(prompt) + len(record['reference'])\n"
        "def broken(prompt, completion, record):\n    return 1 / 0\n"
        "def silent(prompt, completion, record):\n    pass\n"
        "def text(prompt, completion, record):\n    return '1'\n"
        "def endless(prompt, completion, record):\n    return float('inf')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_rewards"
    sys.modules.pop("own_rewards", None)


def test_a_function_gets_prompt_completion_and_record(module):
    assert score(f"{module}:polite", "please", wanted=True) == 1
    assert score(f"{module}:polite", "please", wanted=0.25) == 0.25
    assert score(f"{module}:reference", "", "four") == len("What is it?") + 4
    assert part_names([reward({"function": f"{module}:polite"})]) == ["polite"]


def test_it_is_written_back_as_it_was_given(module):
    given = {"function": f"{module}:polite", "weight": 2.0}
    assert reward(reward(given).model_dump(mode="json", by_alias=True)) == reward(given)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("broken", r"'broken' failed at the record 'sums:1': ZeroDivisionError.*own_rewards.py:6"),
        ("silent", r"'silent' returned None for the record 'sums:1'"),
        ("text", r"'text' returned '1' for the record 'sums:1'"),
        ("endless", r"'endless' returned inf for the record 'sums:1'"),
    ],
)
def test_a_function_that_fails_names_the_record(module, name, said):
    with pytest.raises(DataError, match=said):
        score(f"{module}:{name}", "please")


def test_a_function_that_is_not_there(module):
    with pytest.raises(ManifestError, match=r"has no function 'polit'.*Did you mean 'polite'"):
        score(f"{module}:polit", "please")
    with pytest.raises(ManifestError, match=r"'no_such:thing' cannot be imported.*no_such"):
        score("no_such:thing", "please")


def test_a_record_without_an_answer_is_named():
    with pytest.raises(DataError, match=r"'sums:1': the record has no 'answer' to compare with"):
        score({"name": "number", "answer": "answer"}, "4")
    with pytest.raises(DataError, match=r"'sums:1': the answer in 'reference' has no number"):
        score("number", "4", "four")


# --- calls of tools -----------------------------------------------------------------------------------------

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": 0, "days": [1, 2]}}}
MADE = '<tool_call>{"name": "weather", "arguments": {"days": [1, 2], "city": 0}}</tool_call>'


def called(function: Any, completion: str, *calls: Any, content: str = "") -> float:
    turn = {"role": "assistant", "content": content, "tool_calls": list(calls)}
    prompt = prompt_of(Conversation([{"role": "user", "content": "Rain?"}, turn]), "sums:1", "sums", {})
    part = reward({"function": function})
    return call(part.function, part.name, prompt.example_id, prompt.asked, completion, prompt.rewarded_record)


@pytest.mark.capability("Rewards compare calls of tools as calls")
@pytest.mark.parametrize("function", ["exact_match", "contains"])
@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("", 0),
        (MADE, 1),
        ('{"name": "weather", "parameters": {"city": 0.0, "days": [1, 2]}}', 1),
        ('[TOOL_CALLS] [{"name": "weather", "arguments": "{\\"city\\": 0, \\"days\\": [1, 2]}"}]', 1),
        (MADE.replace("1", "true"), 0),
        (MADE.replace("weather", "forecast"), 0),
        (MADE.replace('"city": 0', '"city": 1'), 0),
        ("weather", 0),
        ("<tool_call>{</tool_call>", 0),
    ],
)
def test_the_right_answer_is_a_call(function, completion, right):
    assert called(function, completion, CALL) == right
    assert called(function, completion, CALL, content="Let me see.") == right


def test_several_calls_and_calls_in_columns():
    other = {"name": "time", "arguments": "{}"}
    both = f'{MADE}\n<tool_call>{{"name": "time", "arguments": {{}}}}</tool_call>'
    assert called("exact_match", both, CALL, other) == called("contains", both, CALL) == 1
    assert called("exact_match", MADE, CALL, other) == called("contains", MADE, CALL, other) == 0
    assert called("exact_match", both, CALL) == 0
    named = {"name": "exact_match", "answer": "calls"}
    for calls in ([CALL], CALL, json.dumps([CALL]), MADE):
        assert score(named, MADE, calls=calls) == 1
        assert score(named, "", calls=calls) == 0


@pytest.mark.parametrize("function", ["number", "mathematics"])
def test_a_call_has_neither_number_nor_expression(function):
    with pytest.raises(DataError, match="the answer in 'reference' is a call of a tool, which has no"):
        called(function, "0", CALL)


@pytest.mark.parametrize("function", ["exact_match", "contains", "number", "mathematics"])
@pytest.mark.parametrize("answer", ["", " \n", [], [None, ""], float("nan")])
def test_nothing_to_compare_with_is_told(function, answer):
    with pytest.raises(DataError, match=r"'sums:1': the record's 'right' is empty, so there is nothing to compare"):
        score({"name": function, "answer": "right"}, "", right=answer)


def test_objects_are_no_answers():
    with pytest.raises(DataError, match="'right' is not a text, a number or a list of them"):
        score({"name": "exact_match", "answer": "right"}, "4", right={"value": 4})


def test_a_judge_that_shall_compare_is_told_where_there_is_nothing(address):
    judge = {"name": "judge", "address": address, "model": "strict", "question": "{reference} {prompt} {completion}"}
    with pytest.raises(DataError, match="the record has none to compare with"):
        score(judge, "four")


# --- rewards of any size and type -----------------------------------------------------------------------------


class Strange:
    def __float__(self) -> float:
        raise RuntimeError

    __repr__ = __float__  # type: ignore[assignment]


def returning(value: Any) -> float:
    class Returns(RewardFunction):
        def score(self, prompt, completion, record):
            return value

    return call(Returns(), "own", "sums:1", "?", "", {})


@pytest.mark.parametrize(
    "value", [1, True, Decimal(1), Fraction(1), np.float16(1), np.int64(1), np.bool_(True), np.array(1.0)]
)
def test_numbers_of_every_type_are_rewards(value):
    assert returning(value) == 1.0


@pytest.mark.parametrize(
    "value",
    [
        *(None, "1", b"1", bytearray(b"1"), np.str_("1"), 1 + 0j, np.complex128(1), [1], {}, np.array([1.0, 2.0])),
        *(math.nan, math.inf, -math.inf, np.float32("nan"), Decimal("nan"), Decimal("sNaN"), Decimal("inf")),
        *(10**400, -(10**5000), Fraction(10**400), 1e200, Strange()),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_no_finite_number_is_told_with_its_sample(value):
    with pytest.raises(DataError, match=r"'own' returned .* for the record 'sums:1', which is no finite number"):
        returning(value)


def test_a_sum_that_is_no_finite_number_is_told():
    prompt = Prompt("sums:1", "sums", "?", None, "4", {})
    with closing(RewardPool(1, 60.0)) as pool:
        scorer = Scorer([reward({"function": "number", "weight": 1e308})], pytest.fail, pool)  # type: ignore[arg-type]
        [right, wrong] = scorer.score([(prompt, "4"), (prompt, "5")])
    assert isinstance(right, Unscored)
    assert "no finite number, at the record 'sums:1'" in right.detail
    assert wrong.total == 0


@pytest.mark.parametrize("completion", ["3", "3.0"])
def test_a_whole_number_that_a_table_keeps_as_floating_point_is_right_either_way(completion):
    assert score({"name": "exact_match", "answer": "right"}, completion, right=3.0) == 1
    assert score({"name": "exact_match", "answer": "right"}, completion, right=3.5) == 0

"""Episodes: what is said between turns, in the very tokens, and in whatever process there is."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import closing

import pytest
import torch

from postlude.data.tokenizer import load_tokenizer
from postlude.errors import DataError
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import ModelFrom, NewModel, TokenizerFrom
from postlude.model.load import load_causal
from postlude.rollout.engine import Request, Sampling
from postlude.rollout.environment import Reply, play
from postlude.rollout.environments.tools import Tools
from postlude.rollout.native import NativeEngine
from postlude.rollout.prompts import Prompt, PromptEncoder
from postlude.rollout.reward_pool import RewardPool, Task, Unscored

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"


def prompt(asked="one?") -> Prompt:
    return Prompt("games:1", "games", asked, None, None, {"number": 1})


@pytest.mark.parametrize("template", [None, CHATML])
@pytest.mark.parametrize("turns", [["first"], ["first", "and second"]])
def test_what_follows_a_turn_is_what_the_template_says_there(template, turns) -> None:
    tokenizer = load_tokenizer(TokenizerFrom(bytes=True))
    encoder = PromptEncoder(tokenizer, template)
    asked = [{"role": "user", "content": "one?"}]
    replies = [[{"role": "user", "content": f"{n} more"}] for n in range(len(turns))]
    # The tokens grow as a trajectory does, and are in the end those of the whole conversation.
    tokens, messages = list(encoder.tokens(prompt(asked))), list(asked)
    for count, (turn, reply) in enumerate(zip(turns, replies, strict=True), 1):
        said = list(tokenizer(turn, add_special_tokens=False).input_ids)
        messages += [{"role": "assistant", "content": turn}, *reply]
        whole = list(encoder.tokens(prompt(messages)))
        end = whole[len(tokens) + len(said)]
        tokens += [*said, end]
        tokens += encoder.reply(prompt(asked), turns[:count], replies[:count], end)
        assert tokens == whole


def test_a_text_goes_on_with_the_text_of_the_reply() -> None:
    tokenizer = load_tokenizer(TokenizerFrom(bytes=True))
    assert PromptEncoder(tokenizer).reply(prompt(), ["no"], [" yes"], 5) == tuple(
        tokenizer(" yes", add_special_tokens=False).input_ids
    )


def test_a_template_that_forgets_turns_carries_no_conversation() -> None:
    encoder = PromptEncoder(load_tokenizer(TokenizerFrom(bytes=True)), FORGETFUL)
    with pytest.raises(DataError, match="does not say a turn of the assistant once, at 'games:1'"):
        encoder.reply(prompt([{"role": "user", "content": "one?"}]), ["no"], [[{"role": "user", "content": "x"}]], 5)


def test_a_completion_goes_on_with_its_own_randomness() -> None:
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    start = ModelFrom(new=NewModel(architecture="llama", config={**config, "vocab_size": 512}))
    engine = NativeEngine(load_causal(start, None, None, seed=1, dtype=torch.float32))
    sampling = Sampling(12, frozenset(), seed=5)
    (whole,) = engine.generate([Request("p", (1, 2, 3), 2)], sampling)
    (begun,) = engine.generate([Request("p", (1, 2, 3), 2, limit=5)], sampling)
    assert begun.tokens == whole.tokens[:5]
    (rest,) = engine.generate([Request("p", (1, 2, 3, *begun.tokens), 2, position=5, limit=7)], sampling)
    assert rest.tokens == whole.tokens[5:]


GAMES = """
import os
from postlude.rollout.environment import Environment, Reply

class Counting(Environment):
    component_name = "counting"
    marks: str

    async def reset(self, prompt, record):
        return Game(self.marks)

class Game:
    def __init__(self, marks):
        self.marks, self.heard = marks, []

    async def step(self, said):
        self.heard.append(said)
        with open(self.marks, "a") as file:
            file.write(f"{os.getpid()}:{said}\\n")
        return None if said == "nothing" else Reply("+".join(self.heard), reward=len(self.heard))
"""


@pytest.fixture
def counting(tmp_path, monkeypatch):
    (tmp_path / "counting_games.py").write_text(GAMES)
    monkeypatch.syspath_prepend(str(tmp_path))
    import counting_games

    yield counting_games.Counting(marks=str(tmp_path / "marks"))
    sys.modules.pop("counting_games")


def test_an_episode_goes_on_in_its_process_and_is_played_again_in_another(counting) -> None:
    def reply(pool: RewardPool, *said: str) -> Reply | Unscored:
        task = Task("games:1", (("games:1@0", 3), "one?", {}, said))
        return pool.run(play, counting, "counting", [task], "the environment 'counting'")[0]

    def marks() -> list[tuple[str, str]]:
        with open(counting.marks) as file:
            return [tuple(line.strip().split(":")) for line in file]

    with closing(RewardPool(1, 20.0)) as pool:
        assert reply(pool, "a") == Reply("a", reward=1)
        assert reply(pool, "a", "b") == Reply("a+b", reward=2)
        assert [said for _, said in marks()] == ["a", "b"]
        os.kill(int(marks()[0][0]), signal.SIGKILL)
        assert reply(pool, "a", "b", "c") == Reply("a+b+c", reward=3)
        assert [said for _, said in marks()] == ["a", "b", "a", "b", "c"]
        assert len({pid for pid, _ in marks()}) == 2
        assert reply(pool, "x", "y") == Reply("x+y", reward=2)  # of another episode under the same key, nothing is kept
        assert reply(pool, "a", "b") == Reply("a+b", reward=2)
        silent = reply(pool, "nothing")
        assert isinstance(silent, Unscored)
        assert "answered None at the record 'games:1'" in silent.detail


TOOLS = '''
async def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b

def undescribed(a):
    return a
'''


@pytest.fixture
def tools(tmp_path, monkeypatch):
    (tmp_path / "own_tools.py").write_text(TOOLS)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "own_tools"
    sys.modules.pop("own_tools", None)


def test_tools_are_described_called_and_answer_what_is_wrong(tools) -> None:
    environment = Tools(functions=[f"{tools}:add"])
    (described,) = environment.tools()
    assert described["function"]["name"] == "add"
    assert described["function"]["parameters"]["required"] == ["a", "b"]

    def step(said: str) -> Reply:
        async def played() -> Reply:
            return await (await environment.reset("", {})).step(said)

        return asyncio.run(played())

    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 3}}\n</tool_call>'
    assert step(call + call) == Reply([{"role": "tool", "name": "add", "content": "5"}] * 2)
    assert step("It is 5.").done
    (wrong,) = step(call.replace("add", "subtract")).messages
    assert wrong["content"] == "ValueError: there is no tool 'subtract', there are add"
    (wrong,) = step("<tool_call>{</tool_call>").messages
    assert wrong["name"] == "error"
    with pytest.raises(ManifestError, match="'undescribed' cannot be described"):
        Tools(functions=[f"{tools}:undescribed"]).check()
    with pytest.raises(ManifestError, match=r"'no_such:thing' is not there.*no_such"):
        Tools(functions=["no_such:thing"]).check()

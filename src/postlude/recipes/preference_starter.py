"""What ``postlude init reward`` and ``init dpo`` write: a policy that learned to speak, and pairs that say how.

Everything is in the manifest and its two files of data, so that the first run needs no network.
"""

from __future__ import annotations

import json
import random
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from postlude.manifest.starter import Starter, run_name

_HEAD = """\
# {title} It runs as it is, in seconds on a CPU:
#
#     postlude validate {file}
#     postlude run {file}
#     postlude {last}
#
# Any key can be set for one run: `postlude run {file} {stage}.steps=200`.

name: {name}
seed: 17
run_dir: runs

data:
  answers:                    # what the first stage learns: a model has to speak before it can be told how
    source: {{path: {answers}}}
    format: messages
    key: id
  pairs:                      # {{"prompt": ..., "chosen": ..., "rejected": ...}}, texts or lists of messages
    source: {{path: {pairs}}}
    format: preference
    key: id
    filters: ["id % 8 <> 0"]  # every eighth is held out
  unseen:
    source: {{path: {pairs}}}
    format: preference
    key: id
    filters: ["id % 8 = 0"]

defaults:
  batch: {{tokens: 2048, block: 256}}   # a block holds whole pairs: as long as the two sides of the longest one
  optimizer: {{name: adamw, lr: 2.0e-3}}
  schedule: {{name: cosine, warmup_steps: 5}}

stages:
  sft:
    recipe: sft
    model:
      new:                    # random weights; `path: Qwen/Qwen3-0.6B` in place of `new` starts from a checkpoint
        architecture: qwen3
        config:
          {{hidden_size: 64, intermediate_size: 192, num_hidden_layers: 2, num_attention_heads: 4,
           num_key_value_heads: 2, head_dim: 16, tie_word_embeddings: true}}
    tokenizer: {{bytes: true}}  # one token a byte; leave it out for a checkpoint, which has its own
    data: {{answers: 1.0}}
    steps: 80
"""

_STAGES = {
    "dpo": """\
  dpo:
    recipe: dpo
    model: {from: sft}
    # reference: {from: sft}  # the frozen model that it stays near; by default the one that it starts from
    data: {pairs: 1.0}
    evaluate: {data: {unseen: 1.0}, every: 20}
    steps: 40
    loss: sigmoid             # or sigmoid_norm, robust, ipo, hinge, simpo, orpo; kto for the format `judged`
    beta: 0.1
    optimizer: {name: adamw, lr: 2.0e-4}
""",
    "reward": """\
  reward:
    recipe: reward
    model: {from: sft}
    data: {pairs: 1.0}
    evaluate: {data: {unseen: 1.0}, every: 20}
    steps: 40
    optimizer: {name: adamw, lr: 1.0e-3}
""",
}
_TITLES = {
    "dpo": (
        "Preference optimisation after fine-tuning.",
        'generate runs/{name}/dpo --prompt "What do you think of cats?"',
    ),
    "reward": ("A reward model after fine-tuning.", "status runs/{name}"),
}

_THINGS = ["cats", "dogs", "tea", "rain", "trains", "maps", "songs", "bread", "snow", "books", "stars", "lakes"]
_KIND = ("I like {}.", "{} are fine, thank you.", "Oh, {}! Lovely.")
_RUDE = ("I hate {}.", "{} again? Go away.", "Who cares about {}!")


def starter(stem: str, recipe: str) -> Starter:
    """The manifest ``STEM.yaml`` with its data, ``STEM-answers.jsonl`` and ``STEM-pairs.jsonl``."""
    answers, pairs = f"{stem}-answers.jsonl", f"{stem}-pairs.jsonl"
    title, last = _TITLES[recipe]
    name = run_name(stem)
    head = _HEAD.format(
        title=title,
        last=last.format(name=name),
        file=shlex.quote(f"{stem}.yaml"),
        stage=recipe,
        name=name,
        answers=json.dumps(answers, ensure_ascii=False),
        pairs=json.dumps(pairs, ensure_ascii=False),
    )
    return Starter(head + _STAGES[recipe], {answers: _lines(_answers()), pairs: _lines(_pairs())})


def _lines(records: Iterator[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def _asked(thing: str) -> dict[str, str]:
    return {"role": "user", "content": f"What do you think of {thing}?"}


def _said(form: str, thing: str) -> dict[str, str]:
    return {"role": "assistant", "content": form.format(thing).capitalize()}


def _answers() -> Iterator[Mapping[str, Any]]:
    """Kind and rude answers alike."""
    said = [(thing, form) for thing in _THINGS for form in (*_KIND, *_RUDE)]
    for number, (thing, form) in enumerate(random.Random(17).sample(said, len(said))):
        yield {"id": number, "messages": [_asked(thing), _said(form, thing)]}


def _pairs() -> Iterator[Mapping[str, Any]]:
    """The kind answer is preferred."""
    said = [(thing, kind, rude) for thing in _THINGS for kind in _KIND for rude in _RUDE]
    for number, (thing, kind, rude) in enumerate(random.Random(17).sample(said, len(said))):
        yield {
            "id": number,
            "prompt": [_asked(thing)],
            "chosen": [_said(kind, thing)],
            "rejected": [_said(rude, thing)],
        }

"""What ``postlude init evaluate`` writes: a small model is measured in three ways, early in its training and
later."""

from __future__ import annotations

import json
import shlex

from postlude.manifest.starter import Starter, run_name
from postlude.recipes.sft_starter import conversations

_MANIFEST = """\
# Two models side by side: what they generate, what they choose, and their loss on held-out data. It runs as it is, in
# half a minute on a CPU:
#
#     postlude validate {file}
#     postlude run {file}
#
# The table is printed, and stands in runs/{name}/stages/report/model/report.json.

name: {name}
seed: 17
run_dir: runs

defaults:
  batch: {{tokens: 2048, block: 512}}
  optimizer: {{lr: 3.0e-3}}

data:
  sums:
    source: {{path: {data}}}
    format: messages
    key: id
    filters: ["id % 8 <> 0"]
  unseen:
    source: {{path: {data}}}
    format: messages
    key: id
    filters: ["id % 8 = 0"]
  choices:
    source: {{path: {choices}}}
    format: multiple_choice             # {{"question": "...", "choices": ["...", ...], "answer": 2}}

stages:
  early:
    recipe: sft
    model:
      new:
        architecture: qwen3
        config:
          {{hidden_size: 64, intermediate_size: 192, num_hidden_layers: 2, num_attention_heads: 4,
           num_key_value_heads: 2, head_dim: 16, tie_word_embeddings: true}}
    tokenizer: {{bytes: true}}
    data: {{sums: 1.0}}
    steps: 30
  later:
    recipe: sft
    model: {{from: early}}
    data: {{sums: 1.0}}
    steps: 150

  report:
    recipe: evaluate
    models: {{early: {{from: early}}, later: {{from: later}}}}  # or one `model`; a `path` where it is there already
    generation:
      data: {{sums: 1.0}}
      samples: 4                        # the mean reward with its standard error, and pass@1, 2, 4
      temperature: 1.0
      max_tokens: 8
      reward: [{{function: number}}]      # rewards as in the recipe generate
    choice: {{data: {{choices: 1.0}}}}    # multiple choice by likelihood
    held_out: {{data: {{unseen: 1.0}}}}   # the loss per token
"""


def starter(stem: str) -> Starter:
    """The manifest ``STEM.yaml`` and its data, ``STEM.jsonl`` and ``STEM-choices.jsonl``."""
    data, choices = f"{stem}.jsonl", f"{stem}-choices.jsonl"
    text = _MANIFEST.format(
        file=shlex.quote(f"{stem}.yaml"),
        name=run_name(stem),
        data=json.dumps(data, ensure_ascii=False),
        choices=json.dumps(choices, ensure_ascii=False),
    )
    records = conversations()
    questions = [_question(record["messages"]) for record in records]
    written = {data: records, choices: questions}
    return Starter(text, {path: "".join(json.dumps(one) + "\n" for one in ones) for path, ones in written.items()})


def _question(messages: list[dict[str, str]]) -> dict[str, object]:
    """The right sum among three that are near it."""
    right = int(messages[1]["content"])
    return {
        "question": messages[0]["content"],
        "choices": [str(right + off) for off in (1, 0, -1, 3)],
        "answer": 1,
    }

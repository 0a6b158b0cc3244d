"""What ``postlude init merge`` writes: a model learns two halves of a task apart, and the two are merged."""

from __future__ import annotations

import json
import shlex

from postlude.manifest.starter import Starter, run_name
from postlude.recipes.sft_starter import conversations

_MANIFEST = """\
# Merging models. It runs as it is, in half a minute on a CPU:
#
#     postlude validate {file}
#     postlude run {file}
#     postlude generate runs/{name}/merged --prompt "What is 3 plus 4?"

name: {name}
seed: 17                    # every random choice follows from it
run_dir: runs               # the run is a folder in it, under the name above

defaults:                   # what the stages have in common
  batch: {{tokens: 2048, block: 512}}
  optimizer: {{lr: 3.0e-3}}

data:
  even:
    source: {{path: {data}}}
    format: messages
    key: id
    filters: ["id % 2 = 0"]
  odd:
    source: {{path: {data}}}
    format: messages
    key: id
    filters: ["id % 2 = 1"]

stages:
  base:
    recipe: sft
    model:
      new:                  # or `path: Qwen/Qwen3-0.6B`
        architecture: qwen3
        config:
          {{hidden_size: 64, intermediate_size: 192, num_hidden_layers: 2, num_attention_heads: 4,
           num_key_value_heads: 2, head_dim: 16, tie_word_embeddings: true}}
    tokenizer: {{bytes: true}}
    data: {{even: 1.0, odd: 1.0}}
    steps: 60
  one: {{recipe: sft, model: {{from: base}}, data: {{even: 1.0}}, steps: 40}}
  two: {{recipe: sft, model: {{from: base}}, data: {{odd: 1.0}}, steps: 40}}

  merged:
    recipe: merge
    method: task_arithmetic # the base and the weighted differences from it; or `average`, or `slerp` of two models
    base: {{from: base}}
    models: {{one: {{from: one}}, two: {{from: two}}}}
    weights: {{one: 0.5, two: 0.5}}

  report:                   # all of them side by side
    recipe: evaluate
    models: {{base: {{from: base}}, one: {{from: one}}, two: {{from: two}}, merged: {{from: merged}}}}
    held_out: {{data: {{even: 1.0, odd: 1.0}}}}
"""


def starter(stem: str) -> Starter:
    """The manifest ``STEM.yaml`` and its data, ``STEM.jsonl``."""
    data = f"{stem}.jsonl"
    text = _MANIFEST.format(
        file=shlex.quote(f"{stem}.yaml"), name=run_name(stem), data=json.dumps(data, ensure_ascii=False)
    )
    return Starter(text, {data: "".join(json.dumps(record) + "\n" for record in conversations())})

"""What ``postlude init generate`` writes: a small model learns, answers, is judged, and learns from what is kept."""

from __future__ import annotations

import json
import shlex

from postlude.manifest.starter import Starter, run_name
from postlude.recipes.sft_starter import conversations

_MANIFEST = """\
# Rejection sampling: a model answers, what is right is kept, and the model learns from it. It runs as it is, in a
# minute on a CPU:
#
#     postlude validate {file}
#     postlude run {file}
#
# What was kept is a data set like any other: runs/{name}/stages/answers/model/data.jsonl.

name: {name}
seed: 17                    # every random choice follows from it
run_dir: runs               # the run is a folder in it, under the name above

defaults:
  batch: {{tokens: 2048, block: 512}}
  optimizer: {{lr: 3.0e-3}}   # for a checkpoint about 1.0e-5

data:
  sums:
    source: {{path: {data}}}
    format: messages
    key: id
  kept:
    source: {{from: answers}}           # what the stage 'answers' makes
    format: messages

stages:
  sft:                                # a model that answers rightly now and then; leave it out for a checkpoint
    recipe: sft
    model:
      new:
        architecture: qwen3
        config:
          {{hidden_size: 64, intermediate_size: 192, num_hidden_layers: 2, num_attention_heads: 4,
           num_key_value_heads: 2, head_dim: 16, tie_word_embeddings: true}}
    tokenizer: {{bytes: true}}
    data: {{sums: 1.0}}
    steps: 150

  answers:
    recipe: generate
    model: {{from: sft}}                # or `path: Qwen/Qwen3-0.6B`
    data: {{sums: 1.0}}                 # the questions; the answers in the data are left out, and are the reference
    samples: 8                        # completions of each question
    max_tokens: 8
    temperature: 1.0
    reward:
      - function: number              # right is the reference's number; or `exact_match`, `contains`, `regex`,
                                      # `package.module:function` of your own, or `model: {{from: STAGE}}`
    keep: {{above: 0.5}}                # or `all`, `best`, `{{top: 2}}`, or `pairs` for a preference data set

  improved:
    recipe: sft
    model: {{from: sft}}
    data: {{kept: 1.0}}
    steps: 100

  report:
    recipe: evaluate
    models: {{sft: {{from: sft}}, improved: {{from: improved}}}}
    generation:
      data: {{sums: 1.0}}
      samples: 4
      temperature: 1.0
      max_tokens: 8
      reward: [{{function: number}}]
"""


def starter(stem: str) -> Starter:
    """The manifest ``STEM.yaml`` and its data, ``STEM.jsonl``."""
    data = f"{stem}.jsonl"
    file = shlex.quote(f"{stem}.yaml")
    text = _MANIFEST.format(file=file, name=run_name(stem), data=json.dumps(data, ensure_ascii=False))
    return Starter(text, {data: "".join(json.dumps(record) + "\n" for record in conversations())})

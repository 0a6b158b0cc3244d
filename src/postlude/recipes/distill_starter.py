"""What ``postlude init distill`` writes: a teacher that learns small sums, and a smaller student that learns from it.

The data are those of the starter of ``sft``; everything is in the two files, so that the first run needs no network.
"""

from __future__ import annotations

import json
import shlex

from postlude.manifest.starter import Starter, run_name
from postlude.recipes import sft_starter

_MANIFEST = """\
# Distillation: a small student learns the distributions of a teacher. It runs as it is, in seconds on a CPU:
#
#     postlude validate {file}
#     postlude run {file}
#     postlude generate runs/{name}/student --prompt "What is 3 plus 4?"
#
# `postlude explain {file} student.divergence` tells what a key means and where its value comes from.

name: {name}
seed: 17                    # every random choice follows from it
run_dir: runs               # the run is a folder in it, under the name above

defaults:
  tokenizer: {{bytes: true}}          # one token a byte; leave it out for checkpoints, which have their own
  data: {{sums: 1.0}}
  evaluate: {{data: {{unseen: 1.0}}, every: 50}}
  batch: {{tokens: 2048, block: 512}}
  optimizer: {{name: adamw, lr: 3.0e-3}}  # for a checkpoint about 1.0e-5
  schedule: {{name: cosine, warmup_steps: 10}}

data:
  sums:
    source: {{path: {data}}}
    format: messages        # a record is {{"messages": [{{"role": "user", "content": "..."}}, ...]}}
    key: id
    filters: ["id % 8 <> 0"]  # SQL over the record: every eighth is held out
  unseen:
    source: {{path: {data}}}
    format: messages
    key: id
    filters: ["id % 8 = 0"]

stages:
  teacher:                  # with a teacher that is there already, leave this stage out
    recipe: sft
    model:
      new:
        architecture: qwen3
        config:
          {{hidden_size: 64, intermediate_size: 192, num_hidden_layers: 2, num_attention_heads: 4,
           num_key_value_heads: 2, head_dim: 16, tie_word_embeddings: true}}
    steps: 150
  student:
    recipe: distill
    model:                  # `path: Qwen/Qwen3-0.6B` in place of `new` starts from a checkpoint
      new:
        architecture: qwen3
        config:
          {{hidden_size: 32, intermediate_size: 96, num_hidden_layers: 1, num_attention_heads: 2,
           num_key_value_heads: 1, head_dim: 16, tie_word_embeddings: true}}
    teacher: {{from: teacher}}          # or `path: Qwen/Qwen3-4B`: any size, with the student's tokenizer
    divergence: forward_kl            # or reverse_kl, or jsd with a `beta`
    temperature: 1.0
    hard_loss: 0.1                    # the share of the likelihood of the data
    steps: 150
"""


def starter(stem: str) -> Starter:
    """The manifest ``STEM.yaml`` and its data, ``STEM.jsonl``."""
    data = f"{stem}.jsonl"
    file = shlex.quote(f"{stem}.yaml")
    text = _MANIFEST.format(file=file, name=run_name(stem), data=json.dumps(data, ensure_ascii=False))
    return Starter(text, {data: "".join(json.dumps(record) + "\n" for record in sft_starter.conversations())})

"""What ``postlude init sft`` writes: a model of random weights that learns small sums, in seconds on a CPU.

Everything is in the two files, so that the first run needs no network; each line says how one's own model and
data take the place of what is there.
"""

from __future__ import annotations

import json
import random
import shlex

from postlude.manifest.starter import Starter, run_name

_MANIFEST = """\
# Supervised fine-tuning. It runs as it is, in seconds on a CPU:
#
#     postlude validate {file}
#     postlude run {file}
#     postlude generate runs/{name}/sft --prompt "What is 3 plus 4?"
#
# `postlude explain {file} sft.optimizer.lr` tells what a key means and where its value comes from.
# Any key can be set for one run: `postlude run {file} sft.steps=400`.

name: {name}
seed: 17                    # every random choice follows from it
run_dir: runs               # the run is a folder in it, under the name above

data:
  sums:                     # a data set, under a name of your choice
    source: {{path: {data}}}
                            # JSON lines, Parquet or CSV; or `hub: NAME`, or `query: SQL` in place of `path`
    format: messages        # a record is {{"messages": [{{"role": "user", "content": "..."}}, ...]}}
    key: id                 # what a record is known by; without it, by its content
    filters: ["id % 8 <> 0"]  # SQL over the record: every eighth is held out
    train_on: assistant     # which turns are learned
  unseen:
    source: {{path: {data}}}
    format: messages
    key: id
    filters: ["id % 8 = 0"]

stages:
  sft:
    recipe: sft
    model:
      new:                  # random weights; `path: Qwen/Qwen3-0.6B` in place of `new` starts from a checkpoint
        architecture: qwen3
        config:
          {{hidden_size: 64, intermediate_size: 192, num_hidden_layers: 2, num_attention_heads: 4,
           num_key_value_heads: 2, head_dim: 16, tie_word_embeddings: true}}
    tokenizer: {{bytes: true}}          # one token a byte; leave it out for a checkpoint, which has its own
    data: {{sums: 1.0}}                 # data sets with their weights in the mixture
    evaluate: {{data: {{unseen: 1.0}}, every: 50}}
    steps: 200                        # or `epochs: 2`
    batch: {{tokens: 2048, block: 512}} # tokens of one optimiser step, and of one packed block
    optimizer: {{name: adamw, lr: 3.0e-3}}  # for a checkpoint about 1.0e-5
    schedule: {{name: cosine, warmup_steps: 10}}
    checkpoint: {{every: 100}}
"""


def starter(stem: str) -> Starter:
    """The manifest ``STEM.yaml`` and its data, ``STEM.jsonl``."""
    data = f"{stem}.jsonl"
    file = shlex.quote(f"{stem}.yaml")
    text = _MANIFEST.format(file=file, name=run_name(stem), data=json.dumps(data, ensure_ascii=False))
    return Starter(text, {data: "".join(json.dumps(record) + "\n" for record in conversations())})


def conversations(count: int = 64) -> list[dict[str, object]]:
    """So many of the hundred sums of two digits, asked and answered."""
    sums = [(a, b) for a in range(10) for b in range(10)]
    return [
        {
            "id": number,
            "messages": [
                {"role": "user", "content": f"What is {a} plus {b}?"},
                {"role": "assistant", "content": str(a + b)},
            ],
        }
        for number, (a, b) in enumerate(random.Random(17).sample(sums, count))
    ]

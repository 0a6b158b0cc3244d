"""What ``postlude init grpo`` and its kin write: a small model, taught partly wrong, learns from rewards."""

from __future__ import annotations

import shlex

from postlude.manifest.starter import Starter, run_name

_MANIFEST = """\
# Online reinforcement learning by {recipe}. It runs as it is, in a minute or two on a CPU:
#
#     postlude validate {file}
#     postlude run {file}
#     postlude generate runs/{name}/rl --prompt "4711>"

name: {name}
seed: 17
run_dir: runs

data:
  lessons:                  # what comes after a number; a third of the answers are wrong
    source: {{query: "
      SELECT [{{'role': 'user', 'content': n || '>'}}, {{'role': 'assistant', 'content': answer::VARCHAR}}] AS messages
      FROM (SELECT n, CASE WHEN hash(n) % 3 = 0 THEN n + 2 + (hash(-n) % 3)::INT ELSE n + 1 END AS answer
            FROM range(1000, 9999) AS numbers(n)) WHERE hash(n + 1) % 10 < 8"}}
    format: messages
    template: &plain "{template}"
  exercises:                # prompts: of a conversation all but the assistant's last turn, which rewards compare with
    source: {{query: "
      SELECT [{{'role': 'user', 'content': n || '>'}}, {{'role': 'assistant', 'content': (n + 1)::VARCHAR}}] AS messages
      FROM range(1000, 9999) AS numbers(n) WHERE hash(n + 1) % 10 = 8"}}
    format: messages
    template: *plain
  unseen:
    source: {{query: "
      SELECT [{{'role': 'user', 'content': n || '>'}}, {{'role': 'assistant', 'content': (n + 1)::VARCHAR}}] AS messages
      FROM range(1000, 9999) AS numbers(n) WHERE hash(n + 1) % 10 = 9"}}
    format: messages
    template: *plain

stages:
  sft:
    recipe: sft
    model:
      new:                  # random weights; `path: Qwen/Qwen3-0.6B` in place of `new` starts from a checkpoint
        architecture: llama
        config:
          {{hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4,
           tie_word_embeddings: true}}
    tokenizer: {{bytes: true}}
    data: {{lessons: 1.0}}
    steps: 120
    batch: {{tokens: 2048, block: 256}}
    optimizer: {{name: adamw, lr: 3.0e-3}}
    schedule: {{name: cosine, warmup_steps: 10}}
  rl:
    recipe: {recipe}
    model: {{from: sft}}
{keys}    data: {{exercises: 1.0}}
    rollout: {{prompts: 32, max_tokens: 6}}   # prompts of a round; the longest answer
    batch: {{tokens: 8192, block: 256}}       # a prompt and its answer fit into a block
    steps: 60
    optimizer: {{name: adamw, lr: 2.0e-4}}
    schedule: {{name: cosine, warmup_steps: 5}}
    evaluate: {{data: {{unseen: 1.0}}, every: 20, limit: 200, samples: 4, temperature: 1.0}}
"""

_TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)

_REWARD = """\
    reward: [{function: exact_match}]     # or number, regex, package.module:function; or {model: {from: STAGE}}
"""


def starter(stem: str, recipe: str) -> Starter:
    """The manifest ``STEM.yaml``, which needs no files beside it."""
    keys = _REWARD
    if recipe == "on_policy_distill":
        keys = "    teacher: {from: sft}                  # a better model, with the same tokenizer\n" + _REWARD
    elif recipe not in ("ppo", "reinforce++"):
        keys = "    group: 8                              # samples of each prompt\n" + _REWARD
    return Starter(
        _MANIFEST.format(
            file=shlex.quote(f"{stem}.yaml"), name=run_name(stem), recipe=recipe, keys=keys, template=_TEMPLATE
        )
    )

"""What ``postlude init filter`` writes: sums, some of them wrong, of which the right ones are kept."""

from __future__ import annotations

import json
import shlex
from typing import Any

from postlude.manifest.starter import Starter, run_name
from postlude.recipes.sft_starter import conversations

_MANIFEST = """\
# Filtering records. It runs as it is, in a second:
#
#     postlude validate {file}
#     postlude run {file}
#
# What was kept stands in runs/{name}/stages/right/model/data.jsonl. Another stage reads it as a data set whose source
# is `{{from: right}}`.

name: {name}
run_dir: runs               # the run is a folder in it, under the name above

data:
  sums:
    source: {{path: {data}}}
    format: messages
    key: id
    filters: ["id < 60"]    # SQL over the record, and registered filters such as `dedupe`

stages:
  right:
    recipe: filter
    data: {{sums: 1.0}}
    reward:                 # judges the last turn; it is written into the records, too
      - function:
          name: number      # or `exact_match`, `contains`, `regex`, `package.module:function` of your own,
          answer: sum       # or `model: {{from: STAGE}}`, a reward model; the column of the right answer
    keep: {{above: 0.5}}      # or `{{share: 0.2}}`, the best fifth; without it everything is kept
"""


def starter(stem: str) -> Starter:
    """The manifest ``STEM.yaml`` and its data, ``STEM.jsonl``."""
    data = f"{stem}.jsonl"
    text = _MANIFEST.format(
        file=shlex.quote(f"{stem}.yaml"), name=run_name(stem), data=json.dumps(data, ensure_ascii=False)
    )
    return Starter(text, {data: "".join(json.dumps(_doubtful(record)) + "\n" for record in conversations())})


def _doubtful(record: dict[str, Any]) -> dict[str, Any]:
    """The sum as a column, and every third answer wrong by one."""
    question, answer = record["messages"]
    right = int(answer["content"])
    wrong = record["id"] % 3 == 0
    return {**record, "sum": right, "messages": [question, {**answer, "content": str(right + wrong)}]}

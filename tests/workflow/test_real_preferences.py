"""Real preferences: a published model is fine-tuned, judges pairs that it has not seen, and comes to follow them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from postlude.runs import Run
from postlude.workflow.run import run

TEMPLATE = """\
{%- for message in messages %}
    {{- '<|' + message.role + '|>\\n' + message.content + (eos_token if message.role == 'assistant' else '\\n') }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}
"""

HHH = """
WITH raw AS (SELECT *, row_number() OVER (ORDER BY chosen_instruction, rejected_instruction) AS id
             FROM read_json_auto('{path}')),
parts AS (SELECT id,
    regexp_extract(chosen_instruction, 'to evaluate:\\n(.*?)\\n\\n###Response', 1, 's') AS prompt,
    regexp_extract(chosen_instruction, 'Response to evaluate:\\n(.*?)\\n\\n###Score', 1, 's') AS chosen,
    regexp_extract(rejected_instruction, 'Response to evaluate:\\n(.*?)\\n\\n###Score', 1, 's') AS rejected
    FROM raw)
SELECT id, [{{'role': 'user', 'content': prompt}}] AS prompt,
    [{{'role': 'assistant', 'content': chosen}}] AS chosen, [{{'role': 'assistant', 'content': rejected}}] AS rejected
FROM parts WHERE length(prompt) > 0 AND trim(chosen) <> trim(rejected)
"""
"""The instructions of hhh_alignment are whole prompts for a judge; the dialogue is cut out of them."""

STEPS = 20


def pairs(shared_data: Path, held_out: bool) -> dict[str, dict[str, Any]]:
    """Two data sets of pairs, of which every fifth is held out."""
    fifth = ("id % 5 = 0",) if held_out else ("id % 5 <> 0",)
    demo = f"""
        SELECT row_number() OVER (ORDER BY chosen.value, rejected.value) AS id, conversations, chosen, rejected
        FROM read_json_auto('{shared_data / "dpo_demo" / "dpo_en_demo.json"}')
    """
    hhh = HHH.format(path=shared_data / "hhh_alignment" / "hhh_alignment_eval.json")
    shared = {"key": "id", "template": TEMPLATE, "filters": [*fifth]}
    return {
        "demo": {"source": {"query": demo}, "format": "sharegpt_preference", **shared},
        "hhh": {"source": {"query": hhh}, "format": "preference", **shared},
    }


@pytest.mark.long
@pytest.mark.capability("A published model judges, and comes to prefer, real answers that it has not seen")
def test_a_published_model_learns_what_is_preferred(shared_data: Path, tmp_path: Path) -> None:
    training, held_out = pairs(shared_data, False), pairs(shared_data, True)
    names = dict.fromkeys(training, 1.0)
    shared = {
        "data": names,
        "evaluate": {"data": {f"unseen-{name}": 1.0 for name in held_out}, "every": STEPS},
        "steps": STEPS,
        "batch": {"tokens": 8192, "block": 2048, "window": 16},
        "threads": 1,
        "schedule": {"name": "cosine", "warmup_steps": 4},
    }
    chosen = {
        "source": {"path": str(shared_data / "dpo_demo" / "dpo_en_demo.json")},
        "format": {"name": "sharegpt", "reply_field": "chosen"},
        "template": TEMPLATE,
        "filters": ["len(conversations) = 1", "length(chosen.value) < 900"],
    }
    manifest = {
        "name": "preferences",
        "seed": 1,
        "run_dir": str(tmp_path / "runs"),
        "data": {**training, **{f"unseen-{name}": data for name, data in held_out.items()}, "chosen": chosen},
        "stages": {
            "sft": {
                "recipe": "sft",
                "model": {"path": str(shared_data / "models" / "stories260K_hf")},
                "data": {"chosen": 1.0},
                "steps": 20,
                "batch": {"tokens": 2048, "block": 1024, "window": 16},
                "optimizer": {"lr": 1e-3},
                "threads": 1,
            },
            "judge": {"recipe": "reward", "model": {"from": "sft"}, **shared, "optimizer": {"lr": 1e-3}},
            "dpo": {"recipe": "dpo", "model": {"from": "sft"}, **shared, "optimizer": {"lr": 3e-4}, "beta": 0.1},
        },
    }
    path = tmp_path / "preferences.yaml"
    path.write_text(json.dumps(manifest))
    assert run(str(path), [], inline=True) == 0
    done = Run(str(tmp_path / "runs" / "preferences"))
    told = [json.loads(line) for line in Path(done.uri, "events.jsonl").read_text().splitlines()]

    def accuracy(stage: str, step: int) -> float:
        """The mean over both held-out sets."""
        found = [event for event in told if event["kind"] == "evaluation" and event["stage"] == stage]
        at_step = [event["metrics"]["accuracy"] for event in found if event["step"] == step]
        assert len(at_step) == 2
        return sum(at_step) / 2

    assert accuracy("judge", STEPS) > accuracy("judge", 0) + 0.1
    assert accuracy("dpo", STEPS) > 0.5, "the reference itself prefers neither side"

"""Chat templates: which of several the artifact has, and what they leave out of what is asked or held out."""

from __future__ import annotations

import pytest

from postlude.data.tokenizer import CHATML
from postlude.manifest.problem import ManifestError
from stages.conftest import chat

SQUARE = (
    "{% for m in messages %}{% if m.role != 'system' %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
ROUND = SQUARE.replace("[{{ m.role }}]", "({{ m.role }})").replace("[assistant]", "(assistant)")


def template_of(project, stage: str) -> str:
    return (project.artifact(stage) / "chat_template.jinja").read_text()


@pytest.mark.capability("The artifact has the template of its conversations, or of several the one that is chosen")
@pytest.mark.parametrize(("first", "second"), [(SQUARE, ROUND), (None, SQUARE)])
def test_of_several_templates_one_has_to_be_chosen(project, first, second) -> None:
    project.data["asked"] |= {} if first is None else {"template": first}
    project.data["more"] = {**project.written("more", [chat("1?", "2")]), "template": second}
    project.stages["tune"] = project.train(data={"asked": 1.0, "more": 1.0})
    error = project.validate().error
    assert isinstance(error, ManifestError)
    assert "asked, more are rendered with different chat templates" in str(error)
    assert ("asked with the tokenizer's own" in str(error)) == (first is None)
    for chosen, template in (("asked", first), ("more", second)):
        project.manifest["name"] = chosen
        project.stages["tune"]["artifact_template"] = chosen
        assert project.run() == 0
        assert template_of(project, "tune") == (template or CHATML)


def test_texts_beside_conversations_have_no_template(project) -> None:
    texts = [{"prompt": "1+1=", "completion": "2"}]
    project.data["texts"] = project.written("texts", texts, "prompt_completion")
    project.data["asked"]["template"] = SQUARE
    project.stages["tune"] = project.train(data={"texts": 1.0, "asked": 1.0})
    assert project.run() == 0
    assert template_of(project, "tune") == SQUARE


def test_the_template_of_preferences_reaches_the_artifact(project) -> None:
    sides = {"chosen": [{"role": "assistant", "content": "2"}], "rejected": [{"role": "assistant", "content": "3"}]}
    pairs = [{"prompt": [{"role": "user", "content": f"{n}?"}], **sides} for n in range(4)]
    del project.data["asked"]
    project.data["pairs"] = {**project.written("pairs", pairs, "preference"), "template": SQUARE}
    project.stages["tune"] = project.train(recipe="dpo", data={"pairs": 1.0}, steps=1)
    assert project.run() == 0
    assert template_of(project, "tune") == SQUARE


@pytest.mark.capability("What a template leaves out of prompts and held-out data is told before anything runs")
def test_what_is_left_out_of_prompts_and_held_out_data_is_told(project) -> None:
    system = [{"role": "system", "content": "Be brief."}]
    records = [{"messages": [*(system if n < 3 else []), *chat(f"{n}?", str(n))["messages"]]} for n in range(8)]
    for name in ("told", "held", "allowed"):
        project.data[name] = {**project.written(name, records), "template": SQUARE}
    project.data["allowed"]["drop_unprinted"] = ["system"]
    reward = [{"function": "exact_match"}]
    generation = {"data": {"told": 1.0, "allowed": 1.0}, "reward": reward, "max_tokens": 4}
    project.data["asked"]["template"] = SQUARE
    online = {"recipe": "grpo", "group": 2, "reward": reward, "rollout": {"prompts": 2, "max_tokens": 4}}
    held_out = {"data": {"held": 1.0}, "every": 1}
    project.stages |= {
        "answers": project.generate(data={"told": 1.0, "allowed": 1.0}),
        "policy": project.train(**online, data={"told": 1.0}, evaluate={**held_out, "samples": 1}),
        "report": {
            "recipe": "evaluate",
            "models": {"one": {"path": project.models["one"]}},
            "generation": generation,
            "held_out": {"data": {"held": 1.0}},
        },
        "tune": project.train(data={"asked": 1.0}, evaluate=held_out),
    }
    report = project.validate()
    assert report.error is None, report.error
    told = {stage.stage: stage.unprinted for stage in report.stages}
    assert told["answers"] == {"told": {"system": 3}}
    assert told["policy"] == told["report"] == {"told": {"system": 3}, "held": {"system": 3}}
    assert told["tune"] == {"held": {"system": 3}}
    counts = {stage["stage"]: stage["trial"] for stage in report.to_json()["stages"]}
    assert counts["answers"]["counts"]["unprinted"]["allowed"]["system"]["count"] == 3
    assert counts["policy"]["counts"]["held_out"]["unprinted"]["held"]["system"]["count"] == 3
    assert counts["report"]["counts"]["unprinted"]["held"]["system"]["count"] == 3

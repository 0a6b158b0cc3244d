"""Where prompts end: whether a prompt has the tokens by itself, when it is asked, that it has before its answer."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import get_args

from postlude.data.encode import Encoder
from postlude.data.encoded_dataset import EncodedDataset
from postlude.data.example import Answer, Tokens, answers_of
from postlude.errors import DataError
from postlude.manifest.schema import Unprinted
from postlude.rollout.prompts import NoPrompt, NotAsked, Prompt, PromptEncoder, PromptEncoders, prompt_of
from postlude.stages.parts import Parts
from postlude.stages.prompts import rows_of

LOOKED_AT = 1024
"""So many records of a data set are compared at most."""
_SHOWN = 4
_PROBE = "Yes"
"""Stands for an answer where the data have none."""


class Boundaries:
    """Compares prompts with what they are before their answers, and remembers how many differ and the first of them."""

    def __init__(self, name: str, encoder: Encoder, asking: PromptEncoder) -> None:
        self._name, self._encoder, self._asking = name, encoder, asking
        self._compared = self._differ = 0
        self._first = ""

    def compare(self, prompt: Prompt, answer: Answer) -> None:
        """Compare one prompt. One that cannot be rendered, or of whose answer nothing is trained, is told elsewhere."""
        try:
            trained, asked = self._encoder.whole(answer), list(self._asking.tokens(prompt))
        except DataError:
            return
        if trained is None:
            return
        self._compared += 1
        if trained[: len(asked)] != asked:
            self._differ += 1
            self._first = self._first or self._show(prompt.example_id, trained, asked)

    def remark(self, way: str) -> list[str]:
        """What a user should know, with the ``way`` out of it; empty where all prompts are the same."""
        if not self._differ:
            return []
        return [
            f"{self._differ} of {self._compared} prompts of '{self._name}' are tokenised otherwise by themselves, as a "
            "model is asked them, than before their answers, as it is trained (spaces at the end, tokens over the "
            f"boundary): {self._first}. {way}"
        ]

    def _show(self, example_id: str, trained: list[int], asked: list[int]) -> str:
        pairs = enumerate(zip(trained, asked, strict=False))
        same = next((place for place, (a, b) in pairs if a != b), min(len(trained), len(asked)))
        start = max(same - 1, 0)
        tokens = self._asking.tokenizer.convert_ids_to_tokens
        texts = [tokens(ids[start : start + _SHOWN]) for ids in (trained, asked)]
        return f"'{example_id}' goes on with {texts[0]} in training and with {texts[1]} when it is asked"


def remark_on_boundaries(source: EncodedDataset, asking: PromptEncoder, apart: bool) -> list[str]:
    """What a user should know of a data set that is trained on. ``apart`` says that its prompts are tokenised apart
    already."""
    name = source.dataset.name
    boundaries = Boundaries(name, source.encoder, asking)
    for _, group, position in islice(rows_of({name: source.dataset}), LOOKED_AT):
        for example_id, example in source.dataset.examples(group, [position])[0]:
            try:
                prompt = prompt_of(example, example_id, name, {})
            except NoPrompt:
                continue
            first = answers_of(example)[0]
            if prompt.reference and not isinstance(first, Tokens):
                boundaries.compare(prompt, first)
    if apart:
        return boundaries.remark(
            "The template writes something else before an answer than where it asks for one: give another as "
            f"data.{name}.template."
        )
    return boundaries.remark(
        f"Set data.{name}.tokenize: apart to train on the tokens that are asked, or move a space from the end of the "
        "prompts to the beginning of the answers."
    )


def remark_on_asked(parts: Parts, prompts: Iterable[Prompt | NotAsked], encoders: PromptEncoders) -> list[str]:
    """What a user should know of prompts that are put to a model which others trained, or another stage did."""
    boundaries: dict[str, Boundaries] = {}
    for prompt in islice(prompts, LOOKED_AT):
        if isinstance(prompt, NotAsked):
            continue
        if prompt.source not in boundaries:
            boundaries[prompt.source] = _boundaries(parts, prompt.source, encoders)
        if prompt.reference or not isinstance(prompt.asked, str) or prompt.asked[-1:].isspace():
            boundaries[prompt.source].compare(prompt, prompt.answered(prompt.reference or _PROBE))
    way = (
        "A model that was trained on both together knows other tokens there: train it with 'tokenize: apart', or take "
        "a space from the end of the prompts."
    )
    return [remark for several in boundaries.values() for remark in several.remark(way)]


def _boundaries(parts: Parts, name: str, encoders: PromptEncoders) -> Boundaries:
    config = parts.manifest.data[name]
    encoder = Encoder(
        encoders.tokenizer,
        template=config.template,
        train_on="all",
        block=1,
        today=parts.today,
        drop_unprinted=get_args(Unprinted),
        apart=config.tokenize == "apart",
    )
    return Boundaries(name, encoder, encoders[name])

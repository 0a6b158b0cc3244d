"""Where prompts end: whether a prompt has the tokens by itself, as a model is asked it, that it had in training."""

from __future__ import annotations

from itertools import islice

from postlude.data.encoded_dataset import EncodedDataset
from postlude.data.example import Answer, Tokens, answers_of
from postlude.errors import DataError
from postlude.rollout.prompts import NoPrompt, Prompt, PromptEncoder, prompt_of
from postlude.stages.prompts import rows_of

LOOKED_AT = 1024
"""So many records of a data set are compared at most."""
_SHOWN = 4


def remark_on_boundaries(source: EncodedDataset, encoder: PromptEncoder, apart: bool) -> str | None:
    """What a user should know where prompts of a data set are asked otherwise than they are trained, with the share and
    one of them; None where all are the same. ``apart`` says that they are tokenised apart already."""
    compared = differ = 0
    shown = ""
    for name, group, position in islice(rows_of({source.dataset.name: source.dataset}), LOOKED_AT):
        for example_id, example in source.dataset.examples(group, [position])[0]:
            first = answers_of(example)[0]
            try:
                prompt = prompt_of(example, example_id, name, {})
                pair = None if isinstance(first, Tokens) else _tokens(source, encoder, prompt, first)
            except (NoPrompt, DataError):
                continue  # told elsewhere
            if pair is None:
                continue
            trained, asked = pair
            compared += 1
            if trained[: len(asked)] != asked:
                differ += 1
                shown = shown or _show(encoder, example_id, trained, asked)
    if not differ:
        return None
    way = (
        "The template writes something else before an answer than where it asks for one: give another as "
        f"data.{source.dataset.name}.template."
        if apart
        else f"Set data.{source.dataset.name}.tokenize: apart to train on the tokens that are asked, or move a space "
        "from the end of the prompts to the beginning of the answers."
    )
    return (
        f"{differ} of {compared} prompts of '{source.dataset.name}' are tokenised otherwise by themselves, as a model "
        "is asked them, than before their answers, as it is trained (spaces at the end, tokens over the boundary): "
        f"{shown}. {way}"
    )


def _tokens(
    source: EncodedDataset, encoder: PromptEncoder, prompt: Prompt, answer: Answer
) -> tuple[list[int], list[int]] | None:
    """What is trained and what is asked; None where nothing is trained after the prompt."""
    trained = source.encoder.whole(answer) if prompt.reference else None
    return None if trained is None else (trained, list(encoder.tokens(prompt)))


def _show(encoder: PromptEncoder, example_id: str, trained: list[int], asked: list[int]) -> str:
    same = next(
        (i for i, (a, b) in enumerate(zip(trained, asked, strict=False)) if a != b), min(len(trained), len(asked))
    )
    start = max(same - 1, 0)
    texts = [encoder.tokenizer.convert_ids_to_tokens(ids[start : start + _SHOWN]) for ids in (trained, asked)]
    return f"'{example_id}' goes on with {texts[0]} in training and with {texts[1]} when it is asked"

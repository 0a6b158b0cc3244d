"""The reward of completions: every part that the manifest names, weighted and added.

A part is a function, or a reward model: one number for a whole conversation, from the head ``scalar`` at its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from transformers import PreTrainedTokenizerBase

from postlude.data.batch import PackedBatch
from postlude.data.chat import Chat, ChatRenderer
from postlude.data.document import Document
from postlude.data.example import Answer, Conversation, Text
from postlude.data.room import Room
from postlude.errors import DataError
from postlude.manifest.problem import ManifestError
from postlude.model.language_model import LanguageModel
from postlude.rollout.prompts import Prompt
from postlude.rollout.reward import Reward, finite, part_names
from postlude.rollout.reward_pool import RewardPool, Unscored
from postlude.training.frozen import batches_of, over_packs


@dataclass(frozen=True)
class Score:
    """The reward of one completion."""

    total: float
    parts: Mapping[str, float]
    """Before they are weighted."""


class RewardModel:
    """Scores answers with a model that has a head ``scalar``.

    Conversations are rendered with the reward model's own template. ``block`` is how many tokens go through it at
    a time. ManifestError if the model has no such head.
    """

    def __init__(self, model: LanguageModel, tokenizer: PreTrainedTokenizerBase, name: str, block: int) -> None:
        if model.scalar is None:
            raise ManifestError(
                f"The model '{name}' has no head that scores, so it cannot reward. Give a model that a reward stage "
                "trained."
            )
        self._model, self._tokenizer, self._name, self._block = model.eval(), tokenizer, name, block
        self._room = Room(self._render, "rendering it with the chat template")

    def score(self, answers: Sequence[tuple[str, Answer]]) -> list[float | Unscored]:
        """The score of each answer, which come with their example ids; none of one that cannot be rendered. DataError
        for one that is too long."""
        ids: dict[int, list[int]] = {}
        failed: dict[int, Unscored] = {}
        chats = [i for i, (_, answer) in enumerate(answers) if isinstance(answer, Conversation)]
        if chats:
            self._renderer  # noqa: B018  (what is wrong with the template is told here)
        for i, text in zip(chats, self._room.map([Chat.of(answers[i][1]) for i in chats]), strict=True):  # type: ignore[arg-type]
            if isinstance(text, str):
                ids[i] = list(self._tokenizer(text, add_special_tokens=False).input_ids)
            else:
                reason = f"the answer cannot be rendered for the reward model '{self._name}'"
                failed[i] = Unscored(reason, f"{reason}, at the record '{answers[i][0]}': {text}")
        ids |= {i: self._text_ids(answer) for i, (_, answer) in enumerate(answers) if isinstance(answer, Text)}
        kept = sorted(ids)
        documents = [self._document(answers[i][0], ids[i]) for i in kept]
        scores = over_packs(documents, batches_of(documents, self._block), self._last_values, self._model.device)
        scored = {i: scores[place] for place, i in enumerate(kept)}
        return [failed[i] if i in failed else scored[i] for i in range(len(answers))]

    def _last_values(self, batch: PackedBatch) -> list[float]:
        last = batch.lengths.cumsum(0).long() - 1
        return self._model.head("scalar")(self._model.hidden(batch)[last])[: batch.documents].tolist()

    @cached_property
    def _renderer(self) -> ChatRenderer:
        return ChatRenderer(self._tokenizer)

    def _render(self, chat: Chat) -> str:
        """In the room."""
        return self._renderer.render(chat)

    def _document(self, example_id: str, ids: list[int]) -> Document:
        limit = self._model.anatomy.longest_document
        if not ids or (limit is not None and len(ids) > limit):
            raise DataError(
                f"The answer to '{example_id}' has {len(ids)} tokens for the reward model '{self._name}', which takes "
                f"1 to {limit}. Shorten prompts or max_tokens."
            )
        return Document(example_id, "", np.array(ids, dtype=np.int64))

    def _text_ids(self, answer: Text) -> list[int]:
        ids = list(self._tokenizer("".join(text for text, _ in answer.pieces)).input_ids)
        end = self._tokenizer.eos_token_id
        if answer.end and end is not None and ids[-1:] != [end]:
            ids.append(end)
        return ids


class Scorer:
    """Scores completions. ``model_of`` gives the reward model that a part names, once it is needed; functions run in
    ``pool``.

    ManifestError if a function is not there.
    """

    def __init__(self, rewards: Sequence[Reward], model_of: Callable[[Reward], RewardModel], pool: RewardPool) -> None:
        self._parts = list(zip(part_names(rewards), rewards, strict=True))
        self._model_of, self.pool = model_of, pool
        self._models: dict[str, RewardModel] = {}
        for _, reward in self._parts:
            if reward.function is not None:
                reward.function.check()

    def reweigh(self, rewards: Sequence[Reward]) -> None:
        """Weigh the parts as these do, which are the same but for their weights."""
        self._parts = list(zip(part_names(rewards), rewards, strict=True))

    def __len__(self) -> int:
        return len(self._parts)

    def score(self, completions: Sequence[tuple[Prompt, str]]) -> list[Score | Unscored]:
        """The reward of each completion of a prompt, or why a function gave it none.

        DataError, naming the record, if a model gives no finite number.
        """
        columns: dict[str, Sequence[float | Unscored]] = {}
        for name, reward in self._parts:
            if reward.function is not None:
                columns[name] = self.pool.score(reward.function, name, completions)
            else:
                columns[name] = self._modelled(name, reward, completions)
        rows = [{name: values[row] for name, values in columns.items()} for row in range(len(completions))]
        unscored = [next((value for value in row.values() if isinstance(value, Unscored)), None) for row in rows]
        ids = [prompt.example_id for prompt, _ in completions]
        return [
            why or self._sum(row, example_id)  # type: ignore[arg-type]
            for why, row, example_id in zip(unscored, rows, ids, strict=True)
        ]

    def _sum(self, parts: Mapping[str, float], example_id: str) -> Score | Unscored:
        weighted = [finite(reward.weight * parts[name]) for name, reward in self._parts]
        total = finite(math.fsum(value for value in weighted if value is not None))
        if total is None or None in weighted:
            reason = "the sum of the weighted rewards is no finite number"
            return Unscored(reason, f"{reason}, at the record '{example_id}'.")
        return Score(total, parts)

    def _modelled(self, name: str, reward: Reward, completions: Sequence[tuple[Prompt, str]]) -> list[float | Unscored]:
        if name not in self._models:
            self._models[name] = self._model_of(reward)
        answers = [(prompt.example_id, prompt.answered(text)) for prompt, text in completions]
        scores = self._models[name].score(answers)
        for (prompt, _), score in zip(completions, scores, strict=True):
            if not isinstance(score, Unscored) and not math.isfinite(score):
                raise DataError(
                    f"The reward model '{name}' gave {score} for '{prompt.example_id}'. Look at its weights."
                )
        return scores


def pass_at_k(samples: int, successes: int, k: int) -> float:
    """The probability that of ``k`` samples, drawn from so many with so many successes, one at least succeeds.

    The unbiased estimate of Chen et al. (2021): ``1 - C(samples - successes, k) / C(samples, k)``.
    """
    return 1.0 - math.comb(samples - successes, k) / math.comb(samples, k)


def passes(rewards: Sequence[Sequence[float]], success: float, samples: int) -> dict[int, list[float]]:
    """pass@k of each prompt, given the rewards of its answers, for the powers of two up to ``samples``; an answer
    passes whose reward is at least ``success``. Prompts with fewer than k answers do not count for it."""
    powers = [2**exponent for exponent in range(samples.bit_length())]
    return {
        k: [pass_at_k(len(row), sum(reward >= success for reward in row), k) for row in rewards if len(row) >= k]
        for k in powers
    }

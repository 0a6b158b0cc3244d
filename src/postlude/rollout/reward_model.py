"""A reward model: one number for a whole conversation, from the head ``scalar`` at its last token."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from postlude.data.batch import PackedBatch
from postlude.data.chat import Chat, ChatRenderer
from postlude.data.document import Document
from postlude.data.example import Answer, Conversation, Text
from postlude.errors import DataError
from postlude.manifest.problem import ManifestError
from postlude.model.language_model import LanguageModel
from postlude.training.frozen import batches_of, over_packs


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
        self._renderer: ChatRenderer | None = None

    def score(self, answers: Sequence[tuple[str, Answer]]) -> list[float]:
        """The score of each answer, which come with their example ids. DataError for one that is too long."""
        documents = [self._document(example_id, answer) for example_id, answer in answers]
        batches = batches_of(documents, self._block)
        scores = over_packs(documents, batches, self._last_values, self._model.device)
        return [scores[place] for place in range(len(documents))]

    def _last_values(self, batch: PackedBatch) -> list[float]:
        last = batch.lengths.cumsum(0).long() - 1
        return self._model.head("scalar")(self._model.hidden(batch)[last])[: batch.documents].tolist()

    def _document(self, example_id: str, answer: Answer) -> Document:
        if isinstance(answer, Conversation):
            if self._renderer is None:
                self._renderer = ChatRenderer(self._tokenizer)
            text = self._renderer.render(Chat.of(answer))
            ids = list(self._tokenizer(text, add_special_tokens=False).input_ids)
        else:
            ids = self._text_ids(answer)
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

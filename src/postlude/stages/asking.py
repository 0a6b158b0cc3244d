"""A model that is not trained and answers prompts, with the reward of what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from typing import Any

from postlude.errors import DataError
from postlude.manifest.schema import ModelPlace
from postlude.recipes.answering import Sampled
from postlude.rollout.answers import Answerer, Group
from postlude.rollout.engine import Sampling
from postlude.rollout.ledger import Issue
from postlude.rollout.prompts import NotAsked, Prompt, PromptEncoders
from postlude.rollout.reward_pool import RewardPool, Unscored
from postlude.rollout.scoring import Score, Scorer
from postlude.rollout.trajectory import Trajectory
from postlude.stages.engines import fixed_engine, stop_ids_of
from postlude.stages.models import Models
from postlude.stages.prompts import encoders_of
from postlude.training.meters import Phases
from postlude.training.workers import Workers

ENOUGH = 8
"""So many samples of a portion that all fail are no accident."""


class Asking:
    """Answers the prompts of data sets with one model as a recipe says. The model is loaded when it is first asked;
    reward functions are looked for at once."""

    def __init__(self, models: Models, model: ModelPlace, config: Sampled, datasets: Iterable[str]) -> None:
        self._models, self._parts, self._model, self._config = models, models.parts, model, config
        self._datasets = list(datasets)
        pool = RewardPool(config.reward_workers, float(config.reward_seconds))
        self._closing = ExitStack()
        """Ends what was started, in whatever state it is."""
        self._closing.callback(pool.close)
        self._scorer = Scorer(config.reward, models.reward_model, pool)

    @cached_property
    def encoders(self) -> PromptEncoders:
        return encoders_of(self._parts, self._parts.tokenizer_of(self._model), self._datasets)

    @cached_property
    def _answerer(self) -> Answerer:
        config = self._config
        engine, configured = fixed_engine(self._models, self._model, config)
        self._closing.callback(engine.close)
        engine.update(0)
        seed = self._parts.manifest.seed if config.seed is None else config.seed
        samplings = {
            name: Sampling(
                config.max_tokens,
                stop_ids_of(configured, self.encoders[name]),
                config.temperature,
                config.top_p,
                seed,
            )
            for name in self._datasets
        }
        room = min((limit for limit in (config.context, engine.context) if limit is not None), default=None)
        return Answerer(
            engine=engine,
            encoders=self.encoders,
            sampling=samplings.__getitem__,
            scorer=self._scorer,
            workers=Workers(device=self._parts.workers.device),  # each rank of the stage asks for itself
            phases=Phases(),
            tell=lambda kind, **fields: None,
            room=room,
            longest_prompt=None if room is None else room - 1,
            is_repeated=False,
            environment=config.environment,
            most_turns=config.turns or 8,
        )

    def answer(
        self, prompts: Iterable[Prompt | NotAsked], tell: Callable[..., None]
    ) -> tuple[list[Group], list[NotAsked]]:
        """Each prompt's samples, answered and scored; and the examples that nothing was made for, the samples among
        them that have no reward because a function failed. ``tell`` takes events.

        DataError, naming the first record, if not one sample has a reward.
        """
        answerer = replace(self._answerer, tell=tell)
        groups: list[Group] = []
        unasked: list[NotAsked] = []
        for number, prompt in enumerate(prompts):
            if isinstance(prompt, NotAsked):
                unasked.append(prompt)
                continue
            begun = answerer.begin(Issue(number, 0, prompt.source, 0, number), prompt, self._config.samples)
            if isinstance(begun, str):
                unasked.append(NotAsked(prompt.example_id, prompt.source, begun))
            else:
                groups.append(begun)
        answered = answerer.answer(groups)
        failed = [sample for group in answered for sample in group if isinstance(sample.score, Unscored)]
        scores = [sample.score for group in answered for sample in group]
        check_any_scored(scores, tell, 1 if self._parts.mode.small else ENOUGH)
        unasked += [
            NotAsked(f"{sample.prompt.example_id}#{sample.sample}", sample.prompt.source, sample.score.reason)
            for sample in failed
            if isinstance(sample.score, Unscored)
        ]
        scored = [[sample for sample in group if sample not in failed] for group in answered]
        return [group for group in scored if group], unasked

    def close(self) -> None:
        """Leave no process at work."""
        self._closing.close()


def check_any_scored(
    scores: Sequence[Score | Unscored | None], tell: Callable[..., None], enough: int = ENOUGH
) -> None:
    """Tell of the samples of a portion that have no reward because a function failed. DataError where all of them have
    none and they are ``enough``: that is no accident of a few records."""
    failed = [score for score in scores if isinstance(score, Unscored)]
    if len(failed) == len(scores) >= enough:
        raise DataError(
            f"Not one of {len(scores)} samples has a reward. The first: {failed[0].detail} Mend the function, or raise "
            "reward_seconds."
        )
    if failed:
        tell("alarm", what="rewards", reason=f"{len(failed)} of {len(scores)} have no reward. {failed[0].detail}")


def score_of(sample: Trajectory) -> Score:
    """The reward of an answered sample: 0 where nothing rewards."""
    return sample.score if isinstance(sample.score, Score) else Score(0.0, {})


def columns_of(sample: Trajectory) -> dict[str, Any]:
    """A prompt and what was answered as the columns of a record, which the formats ``messages`` and
    ``prompt_completion`` read; with an environment, what it said stands between the turns."""
    prompt = sample.prompt
    if isinstance(prompt.asked, str):
        return {"prompt": prompt.asked, "completion": _interleaved(sample.turns, sample.replies)}
    answer = [{"role": "assistant", "content": sample.turns[0] if sample.turns else ""}]
    for reply, turn in zip(sample.replies, sample.turns[1:], strict=True):
        answer += [{"role": "user", "content": reply}] if isinstance(reply, str) else [dict(said) for said in reply]
        answer.append({"role": "assistant", "content": turn})
    columns: dict[str, Any] = {"messages": [*prompt.asked, *answer], "prompt": list(prompt.asked), "completion": answer}
    return columns if prompt.tools is None else {**columns, "tools": list(prompt.tools)}


def _interleaved(turns: Sequence[str], replies: Sequence[Any]) -> str:
    """The turns of a continued text, with what was said between them."""
    pieces = list(turns[:1])
    for reply, turn in zip(replies, turns[1:], strict=True):
        pieces += [str(reply), turn]
    return "".join(pieces)

"""The reward ``judge``: a language model at an address says how good the completion is."""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, field_validator

from postlude.data.example import Record
from postlude.manifest.problem import ManifestError
from postlude.rollout.calls import spoken
from postlude.rollout.reward import REFERENCE, Asked, RewardFunction
from postlude.secrecy import learn, without_credentials

TRIES = 3
ANSWERS_SECONDS = 120.0
"""How long one request may take; the deadline of the sample may be shorter."""
IS_THERE_SECONDS = 10.0
_FIELDS = ("prompt", "completion", REFERENCE)

QUESTION = (
    "How good is this answer, from 0 (useless) to 10 (nothing could be better)? Say the number alone.\n\n"
    "Question:\n{prompt}\n\nAnswer:\n{completion}"
)


class LanguageJudge(RewardFunction):
    """What a language model behind the chat API of OpenAI (vLLM, SGLang, llama.cpp and others serve it) says of the
    completion: the last number in its answer, divided by ``most``."""

    address: Annotated[str, Field(pattern=r"^https?://")]
    """Of the API, as ``http://host:8000/v1``."""
    model: str
    """The model's name there."""
    question: str = QUESTION
    """What it is asked; ``{prompt}``, ``{completion}`` and ``{reference}`` stand for themselves."""
    most: Annotated[float, Field(gt=0)] = 10.0
    """The number of the best answer; more is taken for so much."""
    key_variable: str | None = None
    """The environment variable that holds the key of the API, if it wants one."""

    @field_validator("address")
    @classmethod
    def _holds_no_key(cls, address: str) -> str:
        return without_credentials(address, "Name the variable that holds the key as 'key_variable'")

    @field_validator("question")
    @classmethod
    def _asks_about_the_completion(cls, question: str) -> str:
        if "{completion}" not in question:
            raise ValueError("the question must have {completion} in it, which is to be judged")
        return question

    def check(self) -> None:
        if self.key_variable is not None and not os.environ.get(self.key_variable):
            raise ManifestError(f"The reward 'judge' reads its key from {self.key_variable}, which is not set.")
        try:
            served = [model.get("id") for model in self._call("models", None, IS_THERE_SECONDS).get("data", [])]
        except Redirected as error:
            raise ManifestError(f"The judge at {self.address} {error}") from error
        except (OSError, ValueError, AttributeError) as error:
            raise ManifestError(
                f"The judge at {self.address} does not answer: {error}. Start it, or correct 'address', which ends in "
                "/v1 with most servers."
            ) from error
        if self.model not in served:
            raise ManifestError(
                f"The judge at {self.address} has no model '{self.model}'. It has: {', '.join(map(str, served))}."
            )

    def score(self, prompt: Asked, completion: str, record: Record) -> float | bool:
        question = prompt if isinstance(prompt, str) else "\n\n".join(f"{m['role']}: {spoken(m)}" for m in prompt)
        reference = record.get(REFERENCE)
        reference = "" if reference is None else str(reference)
        if f"{{{REFERENCE}}}" in self.question and not reference.strip():
            raise ValueError(f"the question names {{{REFERENCE}}}, but the record has none to compare with")
        fields = {"prompt": question, "completion": completion, REFERENCE: reference}
        # One pass over the question: braces in what is judged mean nothing.
        text = re.sub("|".join(rf"\{{{field}\}}" for field in _FIELDS), lambda m: fields[m[0][1:-1]], self.question)
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "temperature": 0}
        answer = str(self._ask(body)["choices"][0]["message"]["content"])
        numbers = re.findall(r"\d+(?:\.\d+)?", answer)
        if not numbers:
            raise ValueError(f"the judge's answer has no number: {answer[:80]!r}")
        return min(float(numbers[-1]), self.most) / self.most

    def _ask(self, body: Mapping[str, Any]) -> Any:
        """Ask, and ask again where the judge is busy."""
        for turn in range(TRIES):
            try:
                return self._call("chat/completions", body, ANSWERS_SECONDS)
            except Redirected as error:
                raise ValueError(f"the judge at {self.address} {error}") from error
            except OSError as error:
                refused = isinstance(error, urllib.error.HTTPError) and error.code < 500 and error.code != 429
                if refused or turn == TRIES - 1:
                    raise ValueError(f"the judge at {self.address} does not answer: {error}") from error
                time.sleep(2.0**turn)
        raise AssertionError

    def _call(self, path: str, body: Mapping[str, Any] | None, seconds: float) -> Any:
        headers = {"Content-Type": "application/json"}
        if self.key_variable is not None:
            key = os.environ.get(self.key_variable, "")
            learn(key, self.key_variable)
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address.rstrip('/')}/{path}", data, headers)
        with _OPENER.open(request, timeout=seconds) as answer:
            return json.load(answer)


class Redirected(Exception):
    """A server sends the caller elsewhere."""


class _StaysThere(urllib.request.HTTPRedirectHandler):
    """Goes nowhere else: a key is for the host that it was given for, and a question that is sent on loses its body."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        raise Redirected(f"sends the caller to {newurl}. Give that address if it is the judge's.")


_OPENER = urllib.request.build_opener(_StaysThere)

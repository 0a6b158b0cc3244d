"""Talk to any model: a prompt goes in as text or messages, and its reply comes out as text, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from postlude.data.tokenizer import load_tokenizer
from postlude.errors import UserError
from postlude.model.adapters.merge import config_of, read_merged
from postlude.model.adapters.stored import open_model
from postlude.rollout.engine import Request, Sampling
from postlude.rollout.native import NativeEngine
from postlude.rollout.prompts import Prompt, PromptEncoder
from postlude.rollout.reward import Asked


def talk(place: str, prompt: Asked, *, max_tokens: int = 256, temperature: float = 0.0, seed: int = 0) -> Iterator[str]:
    """Pieces of the reply of the model at ``place``, a Hugging Face directory or a hub name.

    Messages are rendered with the tokenizer's chat template. A text is a user's message where there is such a
    template, and continued as it stands where there is none. Temperature 0 takes the likeliest token.

    ManifestError if there is no model; UserError if there is no template for messages.
    """
    with open_model(place) as stored:
        causal = read_merged(stored, config_of(stored), "auto").eval()
        tokenizer = load_tokenizer(stored.folder)
    if isinstance(prompt, str) and tokenizer.chat_template:
        prompt = [{"role": "user", "content": prompt}]
    if torch.cuda.is_available():
        causal.cuda()
    elif causal.dtype == torch.float16:  # a CPU multiplies fp16 a hundred times slower than fp32
        causal.float()
    request = Request("", encode_prompt(tokenizer, prompt))
    configured: Any = causal.generation_config.eos_token_id
    ends = [*(configured if isinstance(configured, list) else [configured]), tokenizer.eos_token_id]
    sampling = Sampling(max_tokens, frozenset(end for end in ends if end is not None), temperature, seed=seed)
    generator = torch.Generator(causal.device).manual_seed(seed) if temperature else None
    tokens = NativeEngine(causal).stream(request, sampling, generator)
    yield from pieces(tokenizer, (token for token in tokens if token not in sampling.stop_ids))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Asked) -> tuple[int, ...]:
    """The token ids that a reply continues. UserError if there are none, or no template for messages."""
    if not isinstance(prompt, str) and not tokenizer.chat_template:
        raise UserError(
            "The tokenizer has no chat template, so messages cannot be rendered. Give a plain text as the prompt."
        )
    ids = PromptEncoder(tokenizer).tokens(Prompt("", "", prompt, None, None, {}))
    if not ids and isinstance(prompt, str) and tokenizer.bos_token_id is not None:
        ids = (tokenizer.bos_token_id,)
    if not ids:
        raise UserError("The prompt is empty. Give some text for the model to continue.")
    return ids


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come. Characters come whole."""
    seen: list[int] = []
    text = shown = ""
    for token in tokens:
        seen.append(token)
        text = str(tokenizer.decode(seen, skip_special_tokens=True))
        if not text.endswith("�") and len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
    if len(text) > len(shown):
        yield text[len(shown) :]

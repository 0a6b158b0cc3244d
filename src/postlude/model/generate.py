"""Text from any model directory, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from postlude.errors import UserError
from postlude.model.adapters.merge import read_merged
from postlude.model.adapters.stored import open_model


def generate(
    place: str,
    prompt: str | Sequence[dict[str, Any]],
    *,
    max_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """Pieces of the reply of the model at ``place``, a Hugging Face directory or a hub name.

    Messages are rendered with the tokenizer's chat template. A text is a user's message where there is such a
    template, and continued as it stands where there is none. Temperature 0 takes
    the likeliest token. ManifestError if there is no model; UserError if there is no template for messages.
    """
    with open_model(place) as stored:
        causal = read_merged(stored, stored.config(), "auto").eval()
        tokenizer = AutoTokenizer.from_pretrained(stored.folder)
    if isinstance(prompt, str) and tokenizer.chat_template:
        prompt = [{"role": "user", "content": prompt}]
    if torch.cuda.is_available():
        causal.cuda()
    elif causal.dtype == torch.float16:  # a CPU multiplies fp16 a hundred times slower than fp32
        causal.float()
    ids = encode_prompt(tokenizer, prompt)
    yield from stream(causal, tokenizer, ids, max_tokens=max_tokens, temperature=temperature, seed=seed)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[dict[str, Any]]) -> list[int]:
    """The token ids that a reply continues. UserError if there are none, or no template for messages."""
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt).input_ids)
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            ids.pop()  # some tokenizers end every text, and nothing would follow
        if not ids and tokenizer.bos_token_id is not None:
            ids = [tokenizer.bos_token_id]
    else:
        if not tokenizer.chat_template:
            raise UserError(
                "The tokenizer has no chat template, so messages cannot be rendered. Give a plain text as the prompt."
            )
        text = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, tokenize=False)
        ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    if not ids:
        raise UserError("The prompt is empty. Give some text for the model to continue.")
    return ids


@torch.no_grad()
def stream(
    causal: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    vocabulary: int | None = None,
) -> Iterator[str]:
    """Pieces of the text that a transformers model, attending plainly, continues ``ids`` with.

    ``vocabulary`` is the number of real tokens where the model's is padded. Characters come whole.
    """
    generator = torch.Generator(causal.device).manual_seed(seed)
    ends = _end_tokens(causal, tokenizer)
    made: list[int] = []
    shown = ""
    cache = None
    step = torch.tensor([list(ids)], device=causal.device)
    for _ in range(max_tokens):
        output = causal(input_ids=step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        token = _choose(output.logits[0, -1, :vocabulary].float(), temperature, generator)
        if token in ends:
            break
        made.append(token)
        text = str(tokenizer.decode(made, skip_special_tokens=True))
        if not text.endswith("�") and len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
        step = torch.tensor([[token]], device=causal.device)
    text = str(tokenizer.decode(made, skip_special_tokens=True))
    if len(text) > len(shown):
        yield text[len(shown) :]


def _choose(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))


def _end_tokens(causal: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a reply."""
    configured = causal.generation_config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return {end for end in (*ends, tokenizer.eos_token_id) if end is not None}

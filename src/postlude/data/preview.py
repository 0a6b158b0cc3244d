"""The packed blocks as they will be trained on, each token with its text and whether it is trained.

What is shown is taken from the loader's own blocks, never rendered a second time. A character whose bytes are
spread over several tokens stands at the last of them, so the texts of a document, joined, are its decoded text.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

from postlude.data.document import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from postlude.data.loader import StepBlocks


@dataclass(frozen=True)
class PreviewToken:
    id: int
    text: str
    """Empty where the token holds only a part of a character that a later token completes."""
    trained: bool


@dataclass(frozen=True)
class PreviewDocument:
    example_id: str
    source: str
    tokens: list[PreviewToken]

    @property
    def trained_tokens(self) -> int:
        return sum(token.trained for token in self.tokens)


@dataclass(frozen=True)
class PreviewBlock:
    documents: list[PreviewDocument]

    def summary(self, number: int) -> str:
        """One line about the block, the ``number``-th."""
        tokens = sum(len(document.tokens) for document in self.documents)
        trained = sum(document.trained_tokens for document in self.documents)
        return f"Block {number}: documents {len(self.documents)}, tokens {tokens:,}, trained {trained / tokens:.0%}"


@dataclass(frozen=True)
class Preview:
    """Blocks to look at: as JSON, in a terminal, or as a page."""

    blocks: list[PreviewBlock]

    def to_json(self) -> dict[str, Any]:
        """``{"blocks": [{"documents": [{"example_id", "source", "tokens": [{"id", "text", "trained"}]}]}]}``."""
        return asdict(self)

    def render(self) -> RenderableType:
        """For a terminal: trained tokens in bold green, the others dim, documents under a heading each."""
        parts: list[RenderableType] = []
        for number, block in enumerate(self.blocks, 1):
            parts.append(Rule(Text(block.summary(number))))
            for document in block.documents:
                heading = f"{document.example_id}  tokens {len(document.tokens):,}, trained {document.trained_tokens:,}"
                text = Text(overflow="fold")
                for trained, stretch in groupby(document.tokens, key=lambda token: token.trained):
                    joined = "".join(token.text for token in stretch)
                    text.append(_visible(joined), style="bold green" if trained else "dim")
                parts += [Text(heading, style="bold"), Padding(text, (0, 0, 1, 2))]
        return Group(*parts)

    def to_html(self, title: str) -> str:
        """One page that needs nothing else; pointing at a token shows its id."""
        head = Path(__file__).with_name("preview.html").read_text("utf-8")
        parts = [head.replace("TITLE", html.escape(title))]
        for number, block in enumerate(self.blocks, 1):
            parts.append(f"<section><h2>{html.escape(block.summary(number))}</h2>")
            for document in block.documents:
                parts.append(
                    f"<article><header><b>{html.escape(document.example_id)}</b> "
                    f"<span>{html.escape(document.source)}</span> <span>{len(document.tokens):,} tokens, "
                    f"{document.trained_tokens:,} trained</span></header><p>"
                )
                parts += [_token_html(token) for token in document.tokens]
                parts.append("</p></article>")
            parts.append("</section>")
        return "".join([*parts, "</main></body></html>\n"])


def preview(
    steps: Iterable[StepBlocks], tokenizer: PreTrainedTokenizerBase, blocks: int, example: str | None = None
) -> Preview:
    """The first so many blocks of a loader, or as many as there are; of an ``example``, given its id, only those that
    it is in, and of them nothing else."""
    shown: list[PreviewBlock] = []
    for block in (block for step in steps for block in step.blocks if block):
        documents = [one for unit in block for one in unit.documents if example in (None, one.example_id)]
        if not documents:
            continue
        shown.append(PreviewBlock([_document(document, tokenizer) for document in documents]))
        if len(shown) == blocks:
            break
    return Preview(shown)


def token_texts(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The text that each token adds: joined, the text that the ids decode to.

    Bytes that never become a character (of one that truncation cut in two) stand as replacement characters.
    """

    def decode(start: int, end: int) -> str:
        text = tokenizer.decode(ids[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    # Decoders treat the first token apart (a leading space), so each text is what it adds to the one before it.
    before = shown = 0
    for end in range(1, len(ids) + 1):
        known, text = decode(before, shown), decode(before, end)
        if len(text) > len(known) and (end == len(ids) or not text.endswith("\N{REPLACEMENT CHARACTER}")):
            before, shown = shown, end
            yield text[len(known) :]
        else:
            yield ""


def _document(document: Document, tokenizer: PreTrainedTokenizerBase) -> PreviewDocument:
    ids = document.tokens.tolist()
    rows = zip(ids, token_texts(ids, tokenizer), document.trained.tolist(), strict=True)
    return PreviewDocument(document.example_id, document.source, [PreviewToken(*row) for row in rows])


_CONTROLS = {code: chr(0x2400 + code) for code in range(0x20)} | {
    ord("\t"): "⇥\t",
    ord("\n"): "↵\n",
    0x7F: "␡",
    **dict.fromkeys(range(128, 160), "�"),
}


def _visible(text: str) -> str:
    """The text with signs for control characters, which would act on a terminal or be lost."""
    return text.translate(_CONTROLS)


def _token_html(token: PreviewToken) -> str:
    kind = ("t" if token.trained else "u") + ("" if token.text else " part")
    return f'<span class="{kind}" title="{token.id}">{html.escape(_visible(token.text))}</span>'

"""Tokenizers: loaded, one token a byte, or trained on the data.

Those that are made here end a turn of a chat and a text with the same token, begin a text with another (so that its
first real token is predicted, too), and bring a chat template with generation marks, except the one for words.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from postlude import storage
from postlude.data.remote_code import REMEDY, is_trusted
from postlude.manifest.problem import ManifestError
from postlude.manifest.schema import TokenizerFrom, TrainTokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, BEGIN, TURN, END, UNKNOWN = "<|pad|>", "<|begin|>", "<|im_start|>", "<|im_end|>", "<|unknown|>"
"""The special tokens of tokenizers made here; ``UNKNOWN`` is the word tokenizer's alone."""
_SPECIAL = [PAD, BEGIN, TURN, END]
_ENDINGS = (".json", ".txt", ".jinja", ".model")
"""Of the files of a tokenizer."""

CHATML = Path(__file__).with_name("chatml.jinja").read_text("utf-8")
"""The chat template of tokenizers made here."""


def load_tokenizer(where: TokenizerFrom | str, as_found: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer that a manifest asks for, or the one in a directory (also a remote one) or of a hub name.

    ManifestError if it is not there or cannot be read; CorruptError if it was committed and has changed, which is not
    looked at where it is taken ``as_found``; ValueError if it has to be trained first.
    """
    path = where if isinstance(where, str) else where.path
    if path is not None:
        if not as_found and storage.is_committed(path):
            storage.verify(path, _ENDINGS)
        return _load(path)
    if not isinstance(where, str) and where.bytes:
        return _bytes_tokenizer()
    raise ValueError("This tokenizer has to be trained, with train_tokenizer.")


@dataclass(frozen=True)
class NewTokens:
    """Tokens that a tokenizer was given."""

    ids: tuple[int, ...]
    pieces: tuple[tuple[int, ...], ...]
    """What each was split into before."""

    @property
    def vocabulary(self) -> int:
        """How many tokens a model needs to have at least."""
        return max(self.ids) + 1


def with_new_tokens(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]
) -> tuple[PreTrainedTokenizerBase, NewTokens]:
    """A copy of a tokenizer that has these tokens, too, each as it is written wherever it stands.

    ManifestError for one that is empty, twice in the list, in the vocabulary, or that the tokenizer would not write
    back as it is (byte-level ones misread added tokens that are not ASCII).
    """
    known = tokenizer.get_vocab()
    for place, token in enumerate(tokens):
        wrong = "is empty" if not token.strip() else "is in the vocabulary already" if token in known else None
        if wrong or token in tokens[:place]:
            raise ManifestError(
                f"add_tokens: the token {token!r} {wrong or 'is there twice'}. Take it out of the list."
            )
    pieces = tuple(tuple(tokenizer.encode(token, add_special_tokens=False)) for token in tokens)
    grown = copy.deepcopy(tokenizer)
    grown.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    ids = [grown.get_vocab()[token] for token in tokens]
    for token, number in zip(tokens, ids, strict=True):
        if (back := grown.decode([number])) != token:
            raise ManifestError(
                f"add_tokens: this tokenizer would write the token {token!r} back as {back!r}. Choose one of ASCII "
                "characters without spaces at its ends."
            )
    return grown, NewTokens(tuple(ids), pieces)


def has_tokenizer(folder: str) -> bool:
    """Whether a folder holds a tokenizer."""
    return any(storage.exists(storage.join(folder, name)) for name in ("tokenizer.json", "tokenizer_config.json"))


def check_same_ids(tokenizer: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase, whose: str) -> None:
    """ManifestError if the ids of one tokenizer mean other tokens to the ``other``; tokens that only one has may be."""
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    tokens = {number: token for token, number in theirs.items()}
    for token, number in sorted(ours.items(), key=lambda entry: entry[1]):
        there, instead = theirs.get(token), tokens.get(number)
        if (there is not None and there != number) or (instead is not None and instead != token):
            difference = f"there {instead!r} has this id" if instead is not None else f"there it has the id {there}"
            raise ManifestError(
                f"{whose} has another vocabulary than the model that is trained: the first difference is the token "
                f"{token!r}, whose id is {number}; {difference}. Both get the same token ids, so choose two models of "
                "one tokenizer."
            )


def train_tokenizer(config: TrainTokenizer, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A tokenizer trained on ``texts``: the same texts in the same order give the same tokenizer.

    ManifestError if the vocabulary has no room for what every tokenizer needs.
    """
    least = len(_SPECIAL) + (256 if config.kind == "bpe" else 1)
    if config.vocabulary < least:
        raise ManifestError(
            f"tokenizer.train.vocabulary is {config.vocabulary}, and a tokenizer of the kind '{config.kind}' needs "
            f"at least {least}: raise it."
        )
    return _train_words(config, texts) if config.kind == "word" else _train_bpe(config, texts)


def _load(where: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if not storage.has_path(where) and (not storage.is_local(where) or storage.exists(where)):
        return _load_copy(where)
    local = Path(where).expanduser()
    if not local.exists() and (local.is_absolute() or where.startswith((".", "~")) or where.count("/") > 1):
        raise ManifestError(f"There is no tokenizer at {where}. Correct the path, or give a hub name.")
    try:
        place = str(local) if local.exists() else where
        return AutoTokenizer.from_pretrained(place, trust_remote_code=is_trusted(place))
    except Exception as error:
        # The tokenizers library raises the bare class for a file that it cannot read.
        if type(error) is not Exception and not isinstance(error, OSError | ValueError | LookupError):
            raise
        if "trust_remote_code" in str(error):
            raise ManifestError(f"The tokenizer {where} cannot be loaded. {REMEDY}") from error
        first_line = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        raise ManifestError(
            f"The tokenizer {where} cannot be loaded ({first_line}). Give a directory that holds a tokenizer.json, or "
            "the name of a model on the hub."
        ) from error


def _load_copy(where: str) -> PreTrainedTokenizerBase:
    if not storage.exists(where):
        raise ManifestError(f"There is no tokenizer at {where}. Correct the path, or give a hub name.")
    with storage.folder_for_copy(where, "tokenizer") as folder:
        for name in storage.list_directory(where):
            uri = storage.join(where, name)
            # Weights may stand beside the tokenizer's files, all of which are text.
            if name.endswith(_ENDINGS) and not storage.is_directory(uri):
                Path(folder, name).write_bytes(storage.read_bytes(uri))
        return _load(folder)


def _bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is its own token, and its id is its value; the special tokens come after them."""
    tokenizer = Tokenizer(models.BPE(vocab=_byte_alphabet(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(_SPECIAL)
    return _wrap(tokenizer, CHATML)


def _byte_alphabet() -> dict[str, int]:
    """The character that the tokenizers library writes for each byte: itself, where it can be seen."""
    visible = {*range(33, 127), *range(161, 173), *range(174, 256)}
    alphabet, hidden = {}, 0
    for byte in range(256):
        alphabet[chr(byte if byte in visible else 256 + hidden)] = byte
        hidden += byte not in visible
    return alphabet


def _train_bpe(config: TrainTokenizer, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=_SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer, CHATML)


def _train_words(config: TrainTokenizer, texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """One token for each of the most frequent pieces; a rarer one is unknown. Decoding joins them again."""
    tokenizer = Tokenizer(models.WordLevel(unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(config.separator, behavior="removed")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace(Regex(r"\A"), config.separator),
            decoders.Fuse(),
            decoders.Replace(Regex(r"\A" + re.escape(config.separator)), ""),
        ]
    )
    trainer = trainers.WordLevelTrainer(
        vocab_size=config.vocabulary, special_tokens=[*_SPECIAL, UNKNOWN], show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer, None, UNKNOWN)


def _wrap(tokenizer: Tokenizer, template: str | None, unknown: str | None = None) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, begin)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=unknown,
        additional_special_tokens=[TURN],
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )

"""The filter ``dedupe``: records that say the same as one before."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable

from postlude.data.filters.filter import Content, ContentFilter


class Dedupe(ContentFilter):
    """Keeps the first of the records with the same text. Holds 16 bytes and their place in a set for each kept one."""

    normalize: bool = True
    """Compare without regard to case, white space and compatible forms of characters (NFKC)."""

    def judge_pass(self) -> Callable[[Content], str | None]:
        seen: set[bytes] = set()

        def judge(content: Content) -> str | None:
            text = content.text
            if self.normalize:
                text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
            identity = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            if identity in seen:
                return "same text as an earlier record"
            seen.add(identity)
            return None

        return judge

"""Token ids, one after the other, to text that can be shown at once: a character is held back until it is complete.

Read next: `text.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxscale.data.tokenizer import Tokenizer

LONGEST_TAIL = 3
"""Tokens that an unfinished character can have: UTF-8 has at most 4 bytes a character."""


class Words:
    """The text of a row that grows. What `add` and in the end `rest` return, joined, is the text after the prompt."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        # Ids are decoded together with those shown last: many tokenizers drop the space before the first of a text.
        self._context, self._shown = 0, len(self._ids)

    def add(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        self._ids.append(token)
        end = len(self._ids)
        if self._text(end).endswith("\ufffd"):
            # Bytes that are no character (an untrained model writes them) are shown once no continuation can save them.
            end -= LONGEST_TAIL
        return self._show(end)

    def rest(self) -> str:
        """What is still held back, when no more tokens come."""
        return self._show(len(self._ids))

    def _show(self, end: int) -> str:
        if end <= self._shown:
            return ""
        text = self._text(end)[len(self._text(self._shown)) :]
        self._context, self._shown = self._shown, end
        return text

    def _text(self, end: int) -> str:
        return self._tokenizer.decode(self._ids[self._context : end])

"""Text appears in whole characters, and all of it."""

import numpy as np
import pytest

from jaxscale.data.tokenizer import ByteTokenizer
from jaxscale.generate.words import Words


def pieces_of(ids, prompt=(65,), tokenizer=None):
    words = Words(tokenizer or ByteTokenizer(), prompt)
    return [words.add(i) for i in ids] + [words.rest()]


@pytest.mark.parametrize("text", ["plain", "é", "a€b", "𝄞 and 𝄞", "日本語"])
def test_characters_are_held_back_until_they_are_complete(text):
    pieces = pieces_of(text.encode())
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert [piece for piece in pieces if piece] == list(text)


@pytest.mark.parametrize("ids", [[0xE2, 0x82], [0x82] * 9, [0xF0] * 9 + list("é".encode()), [0xC3, 256]])
def test_bytes_that_are_no_character_are_shown_in_the_end(ids):
    assert "".join(pieces_of(ids)) == ByteTokenizer().decode(ids)


def test_random_bytes_give_what_decoding_at_once_gives():
    random = np.random.default_rng(0)
    for _ in range(50):
        ids = np.concatenate([random.integers(0, 257, 20), list("né€𝄞".encode()), random.integers(190, 257, 20)])
        assert "".join(pieces_of(ids.tolist())) == ByteTokenizer().decode(ids)


def test_garbage_does_not_wait_for_the_end():
    assert any(pieces_of([0x82] * 9)[:-1])


class SpaceBefore:
    """As many tokenizers: words carry the space before them, and a text's first space is dropped."""

    def decode(self, ids):
        return " ".join("word" + str(i) for i in ids)


def test_the_space_between_prompt_and_text_is_kept():
    assert pieces_of([1, 2], prompt=[7], tokenizer=SpaceBefore()) == [" word1", " word2", ""]

"""The errors of this room: data that cannot be used, with what, why and how to fix it in the message.

Read next: `tokenizer.py`.
"""


class DataError(ValueError):
    """Input data, a token folder or a tokenizer that cannot be used. The message says what, why, and how to fix it."""


class DamagedData(DataError):
    """A token folder whose files are not what was built."""


class DamagedInput(DataError):
    """An input that cannot be read on: what is left of it is lost."""

    def __init__(self, message: str, record: int = 0) -> None:
        """record: number of the first one that is lost, from 1; 0 = not known."""
        super().__init__(message)
        self.record = record


class TooLarge(DataError):
    """A document that is too large to be tokenised as a whole."""

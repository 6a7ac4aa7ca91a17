"""The errors of this room: data that cannot be used, with what, why and how to fix it in the message.

Read next: `tokenizer.py`.
"""


class DataError(ValueError):
    """Input data, a token folder or a tokenizer that cannot be used. The message says what, why, and how to fix it."""


class DamagedData(DataError):
    """A token folder whose files are not what was built."""

"""Token folders on demand: content-addressed in a cache folder, built once however many processes ask.

The key of a corpus is what is in its files, the tokenizer and the format, not where the files lie. Call this before a
world of processes forms, or in every process: one builds, the others wait. Read next: `corpus.py`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from jaxscale.cache import cache_folder
from jaxscale.data import builtin
from jaxscale.data.build import build_inputs, make_plan
from jaxscale.data.errors import DamagedData, DataError
from jaxscale.data.selection import Selection
from jaxscale.data.sources import find_inputs
from jaxscale.data.token_file import TOKENS, TokenFile, is_token_folder
from jaxscale.data.tokenizer import Tokenizer
from jaxscale.data.verified import how_to_rebuild, open_verified


def ensure_built(address: str, tokenizer: Tokenizer, cache: str = "", text_field: str = "text") -> TokenFile:
    """The token folder of a corpus: `address` itself if it is one, otherwise built into the cache unless it is there.

    `address`: file, folder, glob, fsspec address, built token folder, or `builtin`. `cache`: folder of built ones,
    empty: the user's cache folder. Safe to call from any number of processes at once. A damaged folder of the cache is
    built again. Raises DataError for bad data, or a token folder that is damaged or of another tokenizer.
    """
    if address != builtin.ADDRESS and (is_token_folder(address) or Path(address, TOKENS).is_file()):
        try:
            return open_verified(address, tokenizer.hash)
        except DamagedData as error:
            raise DataError(f"{error}{how_to_rebuild(Path(address), error)}") from error
    inputs = find_inputs([address])
    selection = Selection(text_field)
    plan = make_plan(inputs, tokenizer, selection)
    out = (Path(cache).expanduser() if cache else cache_folder("data")) / plan.hash
    if is_token_folder(out):
        with contextlib.suppress(DataError):  # built again below, under the lock
            return open_verified(out, tokenizer.hash)
    return build_inputs(inputs, out, tokenizer, plan, selection, wait=True, replace=True)

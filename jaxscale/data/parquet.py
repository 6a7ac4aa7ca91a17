"""Documents from Parquet: a row is a document, a row group is what is read at once. Read next: `record_files.py`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import IO, Any

from jaxscale.data.blocks import Block, Cursor, Piece, Problem
from jaxscale.data.errors import DamagedInput, DataError, TooLarge
from jaxscale.data.reading import check_size, collect
from jaxscale.data.sources import Input, open_input


def read_parquet(source: Input, start: Cursor, text_field: str, size: int) -> Iterator[Block]:
    """Blocks of the column `text_field`. Raises DamagedInput, and DataError where there is no such column."""
    try:
        import pyarrow.parquet  # type: ignore[import-untyped]  # noqa: F401  # no stubs
    except ImportError as error:
        raise DataError(f"{source.address} is Parquet, which needs pyarrow: pip install 'jaxscale[parquet]'") from error
    with open_input(source) as file:
        yield from collect(_rows(source, file, start, text_field), size)


def _rows(
    source: Input, file: IO[bytes], start: Cursor, text_field: str
) -> Iterator[tuple[Piece | Problem, Cursor, int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0  # of the file
    try:
        table = pq.ParquetFile(file)
        names = table.schema_arrow.names
        if text_field not in names:
            raise DataError(
                f"{source.address} has no column {text_field!r}; it has {', '.join(names)}: "
                "set data.text-field (--text-field) to the one with the text"
            )
        for group in range(table.num_row_groups):
            before = row
            if group >= start.offset:
                share = source.size * (group + 1) // table.num_row_groups
                skip = start.line if group == start.offset else 0
                row += skip
                for text in itertools.islice(_texts(table, group, text_field), skip, None):
                    row += 1
                    yield (
                        _check(text, source.address, row, text_field, start.input),
                        Cursor(start.input, group, row - before),
                        share,
                    )
            row = before + table.metadata.row_group(group).num_rows
    except (pa.ArrowException, OSError) as error:
        raise DamagedInput(
            f"{source.address} is not readable Parquet ({' '.join(str(error).split())}); "
            "it may be truncated: fetch it again",
            row + 1,
        ) from error


def _texts(table: Any, group: int, field: str) -> Iterator[Any]:
    """The values of one row group."""
    import pyarrow as pa

    for batch in table.iter_batches(batch_size=256, row_groups=[group], columns=[field]):
        column = batch.column(0)
        column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = column.cast("large_binary")  # the bytes as stored: UTF-8 is checked where they are decoded
        yield from (text.as_py() for text in column)


def _check(value: Any, name: str, row: int, field: str, number: int) -> Piece | Problem:
    if not isinstance(value, bytes):
        return Problem(
            number,
            row,
            f"{name}, row {row}: column {field!r} holds {value!r:.40}, not text; "
            "set data.text-field (--text-field) to the column with the text, or leave such rows out of the file",
        )
    try:
        check_size(value, f"{name}, row {row}")
    except TooLarge as error:
        return Problem(number, row, str(error))
    return Piece(name, row, -1, value)

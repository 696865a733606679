"""Columnar files: Parquet, Arrow's own (Feather, and what the datasets library saves), rows in blocks and wanted columns alone."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from minitron.formats.blocks import Block, document_name
from minitron.formats.folders import saved_files
from minitron.formats.streams import Given, check_beginning, wrong

IDS = "input_ids"  # the column of ready-made tokens
READ_AHEAD_BYTES = 2**20  # of a Parquet column; without it, a row group's column is read whole
FILE_MAGIC, OLD_FEATHER = b"ARROW1", b"FEA1"


def parquet_rows(given: Given, start: dict[str, Any] | None) -> Iterator[Block]:
    """Blocks of kind "table" or "tokens" of a Parquet file."""
    import pyarrow.parquet

    place = start or {"document": 0, "group": 0, "row": 0}
    with pyarrow.parquet.ParquetFile(given.path, buffer_size=READ_AHEAD_BYTES) as file:
        wanted = _wanted(given, file.schema_arrow.names)
        groups = [file.metadata.row_group(group) for group in range(file.num_row_groups)]
        # Bytes of all columns, unpacked, wanted or not: asked for those of one column, pyarrow ends the process where a damaged file has them wrong.
        sizes, rows = [group.total_byte_size for group in groups], [group.num_rows for group in groups]
        disk, total = given.path.stat().st_size, sum(rows)
        document, first, skip = place["document"], place["group"], place["row"]
        while first < len(sizes):
            last = _run(sizes, first, given.block_bytes)
            num_rows, row, before = sum(rows[first:last]), 0, sum(rows[:first])
            batches = file.iter_batches(_rows_of(given, num_rows, sum(sizes[first:last])), list(range(first, last)), columns=wanted)
            for batch in batches:
                row += batch.num_rows
                if row <= skip or not batch.num_rows:
                    continue
                if passed := max(skip - (row - batch.num_rows), 0):  # only where the place is of blocks of another size
                    batch = _own(batch.slice(passed))
                end = {"group": first, "row": row} if row < num_rows else {"group": last, "row": 0}
                num_bytes = _share(disk, before + row, total) - _share(disk, before + row - batch.num_rows, total)
                yield _block(given, document, batch, end, num_bytes)
                document += batch.num_rows
            first, skip = last, 0


def arrow_rows(given: Given, start: dict[str, Any] | None) -> Iterator[Block]:
    """Blocks of kind "table" or "tokens" of an Arrow file, or of a saved dataset's folder."""
    paths = saved_files(given.path, given.name) if given.path.is_dir() else [given.path]
    place = start or {"document": 0, "file": 0, "batch": 0, "row": 0}
    document, skip_batches, skip = place["document"], place["batch"], place["row"]
    for number in range(place["file"], len(paths)):
        path = paths[number]
        name = f"{given.name}/{path.name}" if given.path.is_dir() else given.name
        if path != given.path:
            check_beginning(path, name)
        for index, batch, (begins, ends) in _batches(replace(given, path=path, name=name), skip_batches):
            num_each = _rows_of(given, batch.num_rows, batch.nbytes)
            for row in range(skip, batch.num_rows, num_each):
                part = batch.slice(row, num_each)
                done = row + part.num_rows
                end = {"file": number, "batch": index, "row": done} if done < batch.num_rows else {"file": number, "batch": index + 1, "row": 0}
                num_bytes = _share(ends - begins, done, batch.num_rows) - _share(ends - begins, row, batch.num_rows)
                yield _block(given, document, part if part.num_rows == batch.num_rows else _own(part), end, num_bytes)
                document += part.num_rows
            skip = 0
        skip_batches = 0


def _batches(given: Given, first: int) -> Iterator[tuple[int, Any, tuple[int, int]]]:
    """(number, batch, bytes of the file up to its begin and its end) of an Arrow file's batches from `first` on, memory-mapped."""
    import pyarrow

    with pyarrow.memory_map(str(given.path)) as source:
        magic = source.read(len(FILE_MAGIC))
        source.seek(0)
        if magic.startswith(OLD_FEATHER):
            raise wrong(given.name, "is Feather's first version; it must be written anew in the second")
        if magic == FILE_MAGIC:
            with pyarrow.ipc.open_file(source, options=_of_wanted(given, pyarrow.ipc.open_file(source).schema)) as reader:
                for index in range(first, reader.num_record_batches):
                    share = [_share(source.size(), number, reader.num_record_batches) for number in (index, index + 1)]
                    yield index, _checked(reader.get_batch(index)), tuple(share)
            return
        options = _of_wanted(given, pyarrow.ipc.open_stream(source).schema)
        source.seek(0)
        index, begins = 0, 0
        with pyarrow.ipc.open_stream(source, options=options) as reader:
            for batch in reader:
                if index >= first:
                    yield index, _checked(batch), (begins, source.tell())
                index, begins = index + 1, source.tell()
        source.seek(max(source.size() - 4, 0))
        if any(source.read(4)):  # a stream without its end mark is valid, but what writes whole ones writes the mark
            raise wrong(given.name, f"is cut off: it ends after its batch {index:,}, and Arrow's end mark is missing")


def _checked(batch: Any) -> Any:
    """The batch as it is. Offsets that lie outside of it, which would end the process without a word, raise pyarrow's ArrowInvalid."""
    import pyarrow

    for column in batch.columns:
        try:
            column.validate(full=True)
        except pyarrow.ArrowInvalid as error:
            if "UTF8" not in str(error):  # said with its document's number by whoever takes the text out
                raise
    return batch


def _of_wanted(given: Given, schema: Any) -> Any:
    import pyarrow

    wanted = set(_wanted(given, schema.names))
    return pyarrow.ipc.IpcReadOptions(included_fields=[index for index, name in enumerate(schema.names) if name in wanted])


def _wanted(given: Given, fields: list[str]) -> list[str]:
    """The columns to read: the ready-made tokens alone, where there are some and no other column is asked for."""
    if IDS in fields:
        return (given.columns(fields) if given.columns else []) or [IDS]
    return given.columns(fields) if given.columns else fields


def _block(given: Given, document: int, batch: Any, end: dict[str, int], num_bytes: int) -> Block:
    is_tokens = batch.schema.names == [IDS]
    payload = _tokens(given, document, batch.column(0)) if is_tokens else batch
    end = {"document": document + batch.num_rows, **end}
    return Block(given.name, document, batch.num_rows, "tokens" if is_tokens else "table", payload, end, num_bytes)


def _tokens(given: Given, document: int, column: Any) -> tuple[Any, Any]:
    """(ids int32 [N], lengths int64 [documents]) of a column of lists; a null has no tokens."""
    import pyarrow
    from pyarrow import compute

    if not (pyarrow.types.is_nested(column.type) and getattr(column.type, "value_type", None) and pyarrow.types.is_integer(column.type.value_type)):
        raise wrong(given.name, f"has a column {IDS!r}, which must hold lists of token ids, but it holds {column.type}")
    lengths = compute.fill_null(compute.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype("int64")
    ids = column.flatten()
    if ids.null_count:
        raise wrong(given.name, f"has a null among the token ids of documents {document + 1:,} to {document + len(column):,}")
    try:
        return ids.cast(pyarrow.int32()).to_numpy(), lengths
    except pyarrow.ArrowInvalid as error:
        raise wrong(document_name(given.name, document + 1), f"or one soon after has a token id that is none ({error})") from None


def _run(sizes: list[int], first: int, block_bytes: int) -> int:
    """The end of the row groups from `first` on that are read in one go: small ones share blocks."""
    last, total = first, 0
    while last < len(sizes) and (last == first or total < block_bytes):
        total, last = total + sizes[last], last + 1
    return last


def _rows_of(given: Given, num_rows: int, num_bytes: int) -> int:
    """Rows of one block."""
    return max(1, min(num_rows, num_rows * given.block_bytes // max(num_bytes, 1)))


def _share(num_bytes: int, done: int, total: int) -> int:
    return num_bytes * done // total


def _own(part: Any) -> Any:
    """A copy of a batch's part: sent to another process, the part itself would take all of its batch along."""
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, part.schema) as writer:
        writer.write_batch(part)
    return pyarrow.ipc.open_stream(sink.getvalue()).read_next_batch()

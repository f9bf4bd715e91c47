"""Rows that survive a kill: appended to a journal, which becomes a parquet file when whole.

The journal is a hidden file next to the output: Arrow messages, first the schema, then batches of rows, each after
its length and checksum. When it is reopened, what a kill left half-written at its end is cut off, and so is what
is damaged, with all after it; the output appears at once and whole.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from esm2_composer.errors import UserError, system_error
from esm2_composer.files import refuse_existing, sync, try_lock

METADATA_KEY = b"esm2_composer"
ROW_GROUP_BYTES = 32 * 2**20
_HEADER = struct.Struct("<QI")  # of a message: its bytes, and their CRC-32


class Journal:
    """Rows on their way to the parquet file `out`.

    `rows` counts those that are safe, `path` is where. One process at a time may hold a journal.
    """

    def __init__(
        self, out: Path, columns: pa.Schema, origin: dict[str, Any], paths: dict[str, str] | None = None
    ) -> None:
        """Begin the journal of `out`, or continue it.

        Args:
            origin: what the rows follow from, as JSON.
            paths: where that is, perhaps elsewhere when the journal is resumed. Both are kept in the parquet
                file's metadata.

        Raises:
            UserError: `out` exists or cannot be written, another process holds its journal, or the journal was
                begun with another origin.
            TransientError: the disk is full, or fails.
        """
        refuse_existing(out)
        self._out, self.path = out, out.with_name(f".{out.name}.partial")
        self._schema = columns.with_metadata({METADATA_KEY: json.dumps({**(paths or {}), **origin})})
        self._origin = origin
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.path, "ab")  # noqa: SIM115, it stays open
            mine = try_lock(self._file)
        except OSError as error:
            raise system_error(f"{out}: cannot be written ({error})", error) from error
        if not mine:
            raise UserError(f"{out}: another process is writing it")
        try:
            batches = [(batch.num_rows, end) for batch, end in self._batches()]
        except OSError as error:
            raise system_error(f"{self.path}: cannot be read ({error})", error) from error
        self.rows = sum(rows for rows, _ in batches)
        schema = self._schema.serialize()
        if batches:
            self._file.truncate(batches[-1][1])
        elif self._file.tell() > _HEADER.size + schema.size:  # more than a kill left of the first message
            raise UserError(f"{self.path}: damaged; remove it")
        else:
            self._file.truncate(0)
            self._write(schema)

    def _batches(self) -> Iterator[tuple[pa.RecordBatch, int]]:
        """Every whole batch, and where it ends; first an empty one for the schema."""
        for number, (message, end) in enumerate(self._messages()):
            if number:
                yield pa.ipc.read_record_batch(message, self._schema), end
            else:
                self._compare(pa.ipc.read_schema(message))
                yield pa.RecordBatch.from_pylist([], self._schema), end

    def _messages(self) -> Iterator[tuple[pa.Buffer, int]]:
        with open(self.path, "rb") as source:
            size = os.fstat(source.fileno()).st_size
            while len(header := source.read(_HEADER.size)) == _HEADER.size:
                length, checksum = _HEADER.unpack(header)
                message = source.read(min(length, size))  # a damaged length may be any
                if len(message) != length or zlib.crc32(message) != checksum:
                    return
                yield pa.py_buffer(message), source.tell()

    def _compare(self, found: pa.Schema) -> None:
        try:
            old = json.loads(found.metadata[METADATA_KEY])
            differs = [key for key, value in self._origin.items() if old.get(key) != value]
        except (AttributeError, KeyError, TypeError, ValueError):  # none, not ours, no JSON, no text
            raise UserError(f"{self.path}: damaged; remove it") from None
        if not differs:
            if found.equals(self._schema):
                return
            raise UserError(f"{self.path}: damaged; remove it")
        changed = [f"{key} was {old.get(key)!r} and is {self._origin[key]!r}" for key in differs]
        raise UserError(
            f"{self.path} holds the beginning of something else ({'; '.join(changed)}): "
            "remove it, or choose another output"
        )

    def append(self, batch: pa.RecordBatch) -> None:
        self._write(batch.cast(self._schema).serialize())
        self.rows += batch.num_rows

    def _write(self, message: pa.Buffer) -> None:
        try:
            self._file.write(_HEADER.pack(message.size, zlib.crc32(message)))
            self._file.write(message)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise system_error(f"{self.path}: cannot be written ({error.strerror})", error) from error

    def discard(self) -> None:
        """Remove the journal and its rows: nothing can continue from them."""
        self.path.unlink()
        self._file.close()

    def finish(self) -> None:
        """Write the parquet file from the journal, then remove the journal.

        Raises:
            UserError: the file cannot be written, or the journal not be read again.
            TransientError: the disk is full, or fails.
        """
        whole = self._out.with_name(f".{self._out.name}.whole")
        try:
            with pq.ParquetWriter(whole, self._schema, compression="zstd", use_dictionary=False) as writer:
                written = 0
                for table in self._row_groups():
                    writer.write_table(table, row_group_size=max(len(table), 1))
                    written += len(table)
            sync(whole)  # before the journal goes
        except OSError as error:
            whole.unlink(missing_ok=True)
            raise system_error(f"{whole}: cannot be written ({error.strerror or error})", error) from error
        if written != self.rows:
            whole.unlink()
            raise UserError(
                f"{self.path}: damaged, {written:,} of {self.rows:,} rows can be read; "
                "the same command goes on behind these"
            )
        whole.rename(self._out)
        self.discard()

    def _row_groups(self) -> Iterator[pa.Table]:
        held, size = [], 0
        for batch, _ in self._batches():
            held.append(batch)
            size += batch.nbytes
            if size >= ROW_GROUP_BYTES:
                yield pa.Table.from_batches(held)
                held, size = [], 0
        if held:
            yield pa.Table.from_batches(held)

"""FASTA files, plain or compressed with gzip (BGZF too) or zstd, read one record at a time.

The reader only removes formatting: compression, which shows in the first bytes and not in the name, a byte-order
mark, line ends of either kind. What a sequence may hold is up to `records.clean`. A header without a sequence
yields an empty one, and ids may repeat.

An id is a header's first word; of UniProt's `sp|P12345|NAME` it is `P12345`, as MMseqs2 names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pyarrow as pa

from esm2_composer.conversion.records import refusing_nucleotides
from esm2_composer.errors import ReadError, UserError

BLOCK_BYTES = 2**20
UNIPROT = re.compile(r"^(?:sp|tr)\|([^|]+)\|")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def read_fasta(path: Path) -> Iterator[tuple[str, bytes]]:
    """(id, sequence) of every record, in order; the id is "" if the header has none.

    Raises UserError if the file is empty, damaged, cut short, not FASTA or of nucleotides, ReadError if the system
    cannot read it.
    A record that the damage could have touched is not yielded.
    """
    blocks = read_blocks(path)
    first = next(blocks, b"")
    if not first:
        raise UserError(f"{path}: empty")
    rest = first.removeprefix(_BYTE_ORDER_MARK).lstrip()
    if not rest.startswith(b">"):
        raise UserError(f"{path}: not FASTA, it does not begin with '>'")
    _split_header(rest, path, 1)  # or a file of such lines, one record to us, would fill the memory first
    records = enumerate(_records(chain([rest[1:]], blocks)), 1)
    yield from refusing_nucleotides(path, (_parse(record, path, count) for count, record in records))


def _records(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """What is between the `>` that begin lines. However long a record is, each block is scanned once."""
    pieces, line_end = [], b""
    for block in blocks:
        *ends, rest = (line_end + block).split(b"\n>")
        if ends:
            yield b"".join([*pieces, ends[0]])
            yield from ends[1:]
            pieces = []
        line_end = b"\n" if rest.endswith(b"\n") else b""  # the next block may begin with a `>`
        pieces.append(rest.removesuffix(b"\n"))
    yield b"".join([*pieces, line_end])


def _split_header(record: bytes, path: Path, count: int) -> tuple[bytes, bytes]:
    header, _, body = record.partition(b"\n")
    if b"\r" in header.rstrip(b"\r"):
        raise UserError(f"{path}: record {count:,} has lines that end with a carriage return alone")
    return header, body


def _parse(record: bytes, path: Path, count: int) -> tuple[str, bytes]:
    header, body = _split_header(record, path, count)
    words = header.split(None, 1)
    name = words[0].decode(errors="backslashreplace") if words else ""
    uniprot = UNIPROT.match(name)
    return uniprot[1] if uniprot else name, body.translate(None, b"\r\n")


def read_blocks(path: Path) -> Iterator[bytes]:
    """The content of a file, unpacked. Raises as `read_fasta` does, for damage no later than at the end."""
    try:
        with open(path, "rb") as file, pa.input_stream(file, compression=compression(file.peek(4))) as stream:
            while block := stream.read(BLOCK_BYTES):
                yield block
    except FileNotFoundError:
        raise ReadError(f"{path}: no such file") from None
    except OSError as error:
        if error.errno is not None:  # the system's; the decompressors set none
            raise ReadError(f"{path}: cannot be read ({error.strerror})") from error
        raise UserError(f"{path}: damaged or cut short ({error})") from error


def compression(start: bytes) -> str | None:
    """What a file is packed with, gzip or zstd, by its first bytes; None: with neither."""
    if start.startswith(b"\x1f\x8b"):
        return "gzip"
    skippable = start[1:4] == b"\x2a\x4d\x18" and start[0] >> 4 == 5  # pzstd begins with a frame of its own
    return "zstd" if skippable or start.startswith(b"\x28\xb5\x2f\xfd") else None

"""fasta.py: what counts as formatting, compression of every kind, and files that are damaged or something else."""

import gzip
import random
import time
from pathlib import Path

import pyarrow as pa
import pytest

from esm2_composer.conversion import fasta
from esm2_composer.conversion.fasta import read_fasta
from esm2_composer.errors import UserError


def compress(content: bytes, codec: str) -> bytes:
    if codec == "gzip":
        return gzip.compress(content)
    return pa.compress(content, codec, asbytes=True)


def read(folder: Path, content: bytes) -> list[tuple[str, bytes]]:
    (folder / "input").write_bytes(content)
    return list(read_fasta(folder / "input"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        pytest.param(b">a\nMKV\nLLA\n>b\nMK", [("a", b"MKVLLA"), ("b", b"MK")], id="lines, no last end"),
        pytest.param(
            b">a one two\r\nMKV\r\nLLA\r\n\r\n>b\r\nMK\r\n", [("a", b"MKVLLA"), ("b", b"MK")], id="Windows"
        ),
        pytest.param(
            b"\xef\xbb\xbf\n\n>a\nMKV\n\n\n>b\n\nMK\n", [("a", b"MKV"), ("b", b"MK")], id="mark, blank lines"
        ),
        pytest.param(b">a\n>b\nMK\n>c", [("a", b""), ("b", b"MK"), ("c", b"")], id="headers without a sequence"),
        pytest.param(b">a\nMKV\n>a\nMKV\n>a\nLL\n", [("a", b"MKV"), ("a", b"MKV"), ("a", b"LL")], id="ids repeat"),
        pytest.param(b">a some > 3\nMK V*\n", [("a", b"MK V*")], id="content is left alone"),
        pytest.param(b">sp|P12345-2|X_Y Z\nMK\n>tr|Q1|\nMV\n", [("P12345-2", b"MK"), ("Q1", b"MV")], id="UniProt"),
        pytest.param(b"> \nMK\n>\nMV\n", [("", b"MK"), ("", b"MV")], id="headers without an id"),
        pytest.param(b"> a\tb\nM>K\n", [("a", b"M>K")], id="a header begins a line"),
        pytest.param(">é\nMK\n".encode("latin-1"), [("\\xe9", b"MK")], id="an id that is not UTF-8"),
    ],
)
def test_records(tmp_path, content, expected):
    assert read(tmp_path, content) == expected


def random_records(count: int) -> tuple[list[tuple[str, bytes]], bytes]:
    generator = random.Random(0)
    records = [
        (f"p{i}", bytes(generator.choices(b"ACDEFGHIKL", k=generator.randrange(200)))) for i in range(count)
    ]
    lines = (f">{name} x\n".encode() + b"\n".join([s[:60], s[60:120], s[120:]]) + b"\n" for name, s in records)
    return records, b"".join(lines)


@pytest.mark.parametrize("codec", ["none", "gzip", "zstd"])
@pytest.mark.parametrize("block_bytes", [7, 1000, 2**20])
def test_compression_is_seen_in_the_content_and_blocks_leave_no_trace(tmp_path, monkeypatch, codec, block_bytes):
    monkeypatch.setattr(fasta, "BLOCK_BYTES", block_bytes)
    records, content = random_records(300)
    if codec != "none":  # two members or frames, as BGZF and pzstd write
        content = compress(content[:5000], codec) + compress(content[5000:], codec)
    assert read(tmp_path, content) == records


def test_a_long_record_is_read_in_time_in_proportion_to_its_length(tmp_path, monkeypatch):
    monkeypatch.setattr(fasta, "BLOCK_BYTES", 64)
    residues = b"MKVLA" * 400_000
    start = time.process_time()
    assert read(tmp_path, b">a\n" + residues) == [("a", residues)]
    assert time.process_time() - start < 2  # in proportion to its square: 20 s


def test_lines_of_carriage_returns_are_told_at_the_first_block(tmp_path, monkeypatch):
    def blocks(path):
        yield b">a\rMKV\r>b\rMK\r"
        pytest.fail("all of it is read")

    monkeypatch.setattr(fasta, "read_blocks", blocks)
    with pytest.raises(UserError, match="record 1 has lines that end with a carriage return alone"):
        read(tmp_path, b"")


def test_a_zstd_file_may_begin_with_a_skippable_frame(tmp_path):
    skippable = b"\x50\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc"
    assert read(tmp_path, skippable + compress(b">a\nMK\n", "zstd")) == [("a", b"MK")]


@pytest.mark.parametrize("codec", ["gzip", "zstd"])
def test_a_truncated_file_is_an_error_and_its_last_record_is_not_yielded(tmp_path, monkeypatch, codec):
    monkeypatch.setattr(fasta, "BLOCK_BYTES", 1000)
    records, content = random_records(300)
    packed = compress(content, codec)
    (tmp_path / "input").write_bytes(packed[: len(packed) // 2])
    seen = []
    with pytest.raises(UserError, match="input: damaged or cut short"):
        seen.extend(read_fasta(tmp_path / "input"))
    assert seen == records[: len(seen)]
    assert codec == "zstd" or seen  # half a gzip file holds whole records; zstd's one block may not


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ur50_id,sequence\n1,MKV\n", "not FASTA"),
        (b"", "input: empty"),
        (gzip.compress(b"", mtime=0), "input: empty"),
        (b" \n\n", "not FASTA"),
        (b"PAR1\x00\x01", "not FASTA"),
        (b"BZh91AY&SY", "not FASTA"),
        (b">a\rMKV\r>b\rMK\r", "record 1 has lines that end with a carriage return alone"),
        (gzip.compress(b">a\nMK\n", mtime=0) + b"trailing", "damaged"),
    ],
)
def test_what_is_not_fasta_is_a_user_error(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, content)


@pytest.mark.parametrize("count", [5, 200])  # fewer and more records than are looked at
def test_nucleotides_are_told_from_proteins(tmp_path, count):
    gene = b"".join(b">g%d\n%s\n" % (i, b"acgtNACGTR" * 10) for i in range(count))
    with pytest.raises(UserError, match=r"looks like nucleotides \(90 % A, C, G, T, U or N\); give proteins"):
        read(tmp_path, gene.replace(b"R", b"U", 1))
    assert len(read(tmp_path, gene)) == count  # not more than 90 %
    assert len(read(tmp_path, b">short\n" + b"ACGT" * 74)) == 1


@pytest.mark.parametrize(("name", "message"), [("nothing", "no such file"), (".", "Is a directory")])
def test_a_path_that_cannot_be_read_is_a_user_error(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        list(read_fasta(tmp_path / name))


def test_real_proteins(real_data):
    folder = real_data / "tiny" / "fasta"
    members = dict(read_fasta(folder / "members.fasta"))
    representatives = dict(read_fasta(folder / "uniref50.fasta.gz"))
    assert len(representatives) == 312 + 40
    by_accession = {name.removeprefix("UniRef90_"): sequence for name, sequence in members.items()}
    for name, sequence in representatives.items():
        assert by_accession[name.removeprefix("UniRef50_")] == sequence

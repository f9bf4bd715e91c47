"""Embed the proteins of a FASTA file: python tools/embed.py FASTA --model PATH --out FILE.parquet

FASTA is a file, plain, gzip or zstd; PATH a Composer checkpoint, a Hugging Face folder or hub name, or a fair-esm
file. A row of FILE is a protein, in the order of FASTA: its id, its length, the windows it was cut into, and as
`embedding` the mean over its residues, without <cls> and <eos>; with --per-residue also `residue_embeddings`, a
vector per residue. Computed in bf16 on a GPU, in fp32 on a CPU. After a kill the same command resumes.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from functools import partial
from pathlib import Path

from esm2_composer.command import ArgumentParser, in_range, run_command
from esm2_composer.errors import UserError
from esm2_composer.files import refuse_existing
from esm2_composer.gpu_memory import naming_lack
from esm2_composer.imports import slow_imports
from esm2_composer.progress import Progress
from esm2_composer.recipe.schema import MAX_INT


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fasta", type=Path)
    parser.add_argument("--model", required=True, help="the weights")
    parser.add_argument("--out", type=Path, required=True, help="a new parquet file")
    parser.add_argument("--per-residue", action="store_true", help="a vector per residue, beside the mean")
    parser.add_argument("--layer", type=int, help="0 is the embedding; default: the last, after the final norm")
    parser.add_argument(
        "--max-length",
        type=in_range(int, 8, MAX_INT),
        default=1024,
        help="tokens the model sees of a protein at once (%(default)s)",
    )
    parser.add_argument(
        "--long",
        choices=("window", "refuse"),
        default="window",
        help="proteins beyond --max-length: join overlapping windows (default), or stop before anything is done",
    )
    parser.add_argument(
        "--batch-tokens",
        type=in_range(int, 8, MAX_INT),
        default=16384,
        help="tokens computed at a time (%(default)s)",
    )
    parser.add_argument(
        "--max-reject-fraction",
        type=in_range(float, 0, 1),
        default=0.01,
        help="stop if more sequences are unusable (%(default)s)",
    )
    args = parser.parse_args()
    if args.batch_tokens < args.max_length:
        raise UserError(f"--batch-tokens {args.batch_tokens} must hold a window of {args.max_length}")
    refuse_existing(args.out)
    if args.out.suffix != ".parquet":
        raise UserError(f"--out {args.out} must end in .parquet")
    if not args.fasta.is_file():
        raise UserError(f"{args.fasta}: no such file (a pipe will not do: it is read twice)")

    with slow_imports():
        import torch

        from esm2_composer.embedding import Embedder, digest_weights, embed_file, survey
        from esm2_composer.journal import Journal
        from esm2_composer.model import ESM2

    model = ESM2.from_pretrained(args.model).eval()
    layers = model.config.num_layers
    layer = layers if args.layer is None else args.layer
    if not 0 <= layer <= layers:
        raise UserError(f"--layer {layer}: {args.model} has layers 0 to {layers}")
    found = survey(args.fasta, args.max_length, args.max_reject_fraction)
    print_survey(found, args.max_length)
    if found.over_limit and args.long == "refuse":
        raise UserError(
            f"{args.fasta}: {found.over_limit:,} proteins are longer than {args.max_length - 2:,} residues, "
            f"the longest {found.longest:,}; remove them, or embed them in windows with --long window"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    origin = {
        "fasta_digest": found.digest,
        "weights_digest": digest_weights(model),
        "layer": layer,
        "pooling": "mean over residues",
        "per_residue": args.per_residue,
        "max_length": args.max_length,
        "precision": "bf16" if device.type == "cuda" else "fp32",
        "rejected": dict(found.rejected),
        "changed": dict(found.changed),
    }
    with naming_lack(f"set --batch-tokens below {args.batch_tokens}"):
        embedder = Embedder(model.to(device), layer, args.max_length, args.batch_tokens, args.per_residue)
        paths = {"fasta": str(args.fasta), "model": args.model}
        journal = Journal(args.out, embedder.columns, origin, paths)
        if journal.rows:
            print(f"going on after {journal.rows:,} proteins of an earlier run", file=sys.stderr)
        try:
            with contextlib.closing(Progress("embed")) as show:
                told = partial(show, "residues", total=found.residues)
                embed_file(args.fasta, found.proteins, journal, embedder, told)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{journal.rows:,} proteins are kept: the same command goes on") from None
    print(f"{args.out}: {found.proteins:,} proteins", file=sys.stderr)


def print_survey(found, max_length: int) -> None:
    print(f"{found.proteins:,} proteins, {found.residues:,} residues", file=sys.stderr)
    if found.over_limit:
        print(f"longer than {max_length - 2:,} residues: {found.over_limit:,}", file=sys.stderr)
    if found.repeated:
        print(f"ids that come again: {found.repeated:,}, such as {found.repeated_id!r}", file=sys.stderr)
    for reason, count in found.rejected.items():
        print(f"rejected, {reason}: {count:,} (first: {found.examples[reason]!r})", file=sys.stderr)
    for change, count in found.changed.items():
        print(f"changed, {change}: {count:,}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)

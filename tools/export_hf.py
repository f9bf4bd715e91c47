"""Export a checkpoint for transformers: python tools/export_hf.py CHECKPOINT OUT

CHECKPOINT is a Composer checkpoint, a Hugging Face folder or hub name, or a fair-esm file; OUT is a new folder
that `AutoModelForMaskedLM` and `AutoTokenizer` load. It appears whole or not at all.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from esm2_composer.command import ArgumentParser, run_command
from esm2_composer.files import appearing_whole, refuse_existing
from esm2_composer.imports import slow_imports


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    refuse_existing(args.out, "folder")

    with slow_imports():
        from esm2_composer.model import ESM2

    export(ESM2.from_pretrained(args.checkpoint), args.out)
    for file in sorted(args.out.iterdir()):
        print(f"{file}  {file.stat().st_size:,} bytes")
    print(
        "\nfrom transformers import AutoModelForMaskedLM, AutoTokenizer\n"
        f"model = AutoModelForMaskedLM.from_pretrained({str(args.out)!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(args.out)!r})"
    )


def export(model, out: Path) -> None:
    """Write the ESM2 `model` as the new folder `out`."""
    from safetensors import SafetensorError

    with appearing_whole(out) as partial:
        try:
            model.save_hf(partial)
        except SafetensorError as error:  # which contains the system's message
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else None, str(error)) from error


if __name__ == "__main__":
    run_command(main)

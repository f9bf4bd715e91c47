"""Export a checkpoint for transformers: python tools/export_hf.py CHECKPOINT OUT

CHECKPOINT is a Composer checkpoint, a Hugging Face folder or a fair-esm file; OUT is a new folder that
`AutoModelForMaskedLM` and `AutoTokenizer` load.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from esm2_composer.errors import UserError, run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise UserError(f"{args.out} exists already; choose a new folder")

    from esm2_composer.model import ESM2

    ESM2.from_pretrained(args.checkpoint).save_hf(args.out)
    for file in sorted(args.out.iterdir()):
        print(f"{file}  {file.stat().st_size:,} bytes")
    print(
        "\nfrom transformers import AutoModelForMaskedLM, AutoTokenizer\n"
        f"model = AutoModelForMaskedLM.from_pretrained({str(args.out)!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({str(args.out)!r})"
    )


if __name__ == "__main__":
    run_command(main)

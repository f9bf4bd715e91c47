"""Perplexity of a checkpoint on a validation split: python tools/evaluate.py CHECKPOINT --data URI

CHECKPOINT is a Composer checkpoint, a Hugging Face folder or a fair-esm file. The whole split is scored, with
the same masked tokens every time; with the defaults, those of the recipes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tqdm import tqdm

from esm2_composer.errors import UserError, run_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--data", required=True, help="what the recipe calls data.remote")
    parser.add_argument("--local", help="cache folder, if --data is in an object store")
    parser.add_argument("--split", default="valid")
    parser.add_argument("--seed", type=int, default=17, help="the recipe's seed, which fixes the masks")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--replacement", choices=("amino_acids", "all_tokens"), default="amino_acids")
    parser.add_argument("--microbatch-tokens", type=int, default=16384, help="tokens computed at a time")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    args = parser.parse_args()
    if args.max_length < 8:
        raise UserError(f"--max-length {args.max_length} must be at least 8")
    if args.microbatch_tokens < args.max_length:
        raise UserError(f"--microbatch-tokens {args.microbatch_tokens} must hold a sequence of {args.max_length}")
    if "://" in args.data and not args.local:
        raise UserError(f"--data {args.data} needs --local, a folder for its cache")
    if "://" not in args.data and not (Path(args.data) / args.split / "index.json").is_file():
        raise UserError(f"{args.data} holds no {args.split} shards ({args.split}/index.json)")

    import torch

    from esm2_composer.config import DataSection
    from esm2_composer.data import ClusterDraw, evaluation_loader
    from esm2_composer.evaluation import evaluate
    from esm2_composer.masking import MaskingRule
    from esm2_composer.model import ESM2
    from esm2_composer.pool import Pool

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = ESM2.from_pretrained(args.checkpoint).to(device)
    draw = ClusterDraw(args.seed, args.max_length, 1, MaskingRule(all_tokens=args.replacement == "all_tokens"))
    remote, local = DataSection(remote=args.data, local=args.local).split(args.split)
    loader = evaluation_loader(draw, remote, local, global_batch_size=64, num_workers=0)
    pool = Pool(args.microbatch_tokens)
    batches = tqdm(loader, desc="evaluate", disable=None)
    result = evaluate(net, (m for batch in batches for m in pool(batch)["microbatches"]), device)

    print(
        f"{args.checkpoint} on {args.data}/{args.split}: perplexity {result['perplexity']:.4f}, "
        f"loss {result['loss']:.5f}, accuracy {result['accuracy']:.4f} "
        f"over {result['masked_tokens']:,} masked tokens of {result['sequences']:,} sequences",
        file=sys.stderr,
    )
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)

"""What the ranks together see of each global batch: python tests/global_batches.py N SCENARIOS.json

The N ranks are forks of one process, which imports but once.

Each scenario is {"shards", "evaluation", "workers", "batch", "budget", "max_length", "state", "batches", "out"}.
Rank r writes OUT-r.json: for each batch, what every sequence of its microbatches shows, how much work and how many
microbatches those are; and the state to resume from.
"""

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import torch
from composer.utils import dist

from esm2_composer import alphabet
from esm2_composer.data.draw import ClusterDraw
from esm2_composer.data.loaders import evaluation_loader, train_loader
from esm2_composer.data.masking import MaskingRule
from esm2_composer.data.pool import data_spec

torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.2  # as in conftest.py


def sequences(microbatch) -> list[str]:
    """Tokens and labels of each sequence, as text."""
    labels = torch.full((len(microbatch["tokens"]),), alphabet.PAD)
    labels[microbatch["positions"]] = microbatch["targets"]
    lengths = microbatch["cu_seqlens"].diff().tolist()
    if not microbatch["num_sequences"]:
        return []
    parts = zip(microbatch["tokens"].split(lengths), labels.split(lengths), strict=True)
    return [f"{tokens.tolist()} {truth.tolist()}" for tokens, truth in parts]


def run(scenario: dict) -> None:
    open_loader = evaluation_loader if scenario["evaluation"] else train_loader
    draw = ClusterDraw(seed=5, max_length=scenario["max_length"], min_length=8, masking=MaskingRule())
    loader = open_loader(draw, None, scenario["shards"], scenario["batch"], scenario["workers"])
    spec = data_spec(loader, scenario["budget"], hidden_size=1280)
    in_epoch = 0
    if scenario["state"]:
        loader.dataset.load_state_dict(scenario["state"])
        in_epoch = scenario["state"]["sample_in_epoch"] // scenario["batch"]
    seen: list[list[str]] = []
    work: list[int] = []
    microbatches: list[int] = []
    while len(seen) < scenario["batches"]:
        for batch in spec.dataloader:
            parts = spec.split_batch(batch, 1)
            seen.append([each for part in parts for each in sequences(part)])
            work.append(batch["work"])
            microbatches.append(len(parts))
            in_epoch += 1
            if len(seen) == scenario["batches"]:
                break
        else:
            in_epoch = 0
    done = in_epoch * scenario["batch"]
    state = None if scenario["evaluation"] else loader.dataset.state_dict(done, from_beginning=True)
    out = Path(f"{scenario['out']}-{dist.get_global_rank()}.json")
    out.write_text(json.dumps({"seen": seen, "work": work, "microbatches": microbatches, "state": state}))


def run_as(rank: int, ranks: int, port: int, scenarios: list[dict]) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "NODE_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.initialize_dist("cpu")
    for scenario in scenarios:
        run(scenario)


if __name__ == "__main__":
    ranks, scenarios = int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        multiprocessing.get_context("fork").Process(target=run_as, args=(rank, ranks, port, scenarios))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))

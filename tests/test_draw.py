"""What a cluster shows in an epoch: members, windows and masks, uniform and keyed."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from conftest import cluster

from esm2_composer import alphabet
from esm2_composer.data.draw import ClusterDraw
from esm2_composer.data.masking import MaskingRule

NOTHING_MASKED = MaskingRule(fraction=1e-15)
DRAW = ClusterDraw(seed=5, max_length=24, min_length=8, masking=MaskingRule())


def shown(draw: ClusterDraw, of: dict[str, Any], epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """(inputs, labels) of a cluster in an epoch."""
    batch = draw.collate([draw.window(of, epoch)])
    return batch["tokens"].numpy(), batch["labels"].numpy()


def windows(of: dict[str, Any], max_length: int, epochs: int) -> list[str]:
    """What is shown in each epoch, as text with < and > for the ends, unmasked."""
    draw = ClusterDraw(seed=1, max_length=max_length, min_length=1, masking=NOTHING_MASKED)
    return [text(shown(draw, of, epoch)[0]) for epoch in range(epochs)]


def text(tokens: np.ndarray) -> str:
    return "".join({alphabet.CLS: "<", alphabet.EOS: ">"}.get(i) or alphabet.TOKENS[i] for i in tokens.tolist())


def assert_uniform(seen: list[str], over: list[str]) -> None:
    counts = np.array([seen.count(each) for each in over])
    assert counts.sum() == len(seen), f"also shown: {set(seen) - set(over)}"
    expected, freedom = len(seen) / len(over), len(over) - 1
    assert ((counts - expected) ** 2 / expected).sum() < freedom + 4 * np.sqrt(2 * freedom)


# Members


def test_members_are_uniform_over_epochs() -> None:
    seen = windows(cluster(b"A" * 30, b"C", b"D" * 7, b"E" * 30), max_length=50, epochs=4000)
    assert_uniform(seen, [f"<{'A' * 30}>", "<C>", f"<{'D' * 7}>", f"<{'E' * 30}>"])


def test_members_of_a_huge_cluster_are_uniform() -> None:
    """5,000 members, each of which shows the tenth of them that it is in."""
    tenths = "ACDEFGHIKL"
    members = [letter.encode() for letter in tenths for _ in range(500)]
    assert_uniform(windows(cluster(*members), max_length=50, epochs=1000), [f"<{letter}>" for letter in tenths])


def test_members_below_min_length_are_not_shown() -> None:
    draw = ClusterDraw(seed=1, max_length=50, min_length=5, masking=NOTHING_MASKED)
    some = cluster(b"AAAA", b"CCCCC", b"D", b"EEEEEE", b"FFFF")
    assert_uniform([text(shown(draw, some, epoch)[0]) for epoch in range(2000)], ["<CCCCC>", "<EEEEEE>"])


def test_all_members_are_shown_if_none_has_min_length() -> None:
    draw = ClusterDraw(seed=1, max_length=50, min_length=5, masking=NOTHING_MASKED)
    some = cluster(b"AAAA", b"CC", b"D")
    assert_uniform([text(shown(draw, some, epoch)[0]) for epoch in range(2000)], ["<AAAA>", "<CC>", "<D>"])


# Windows


def test_windows_are_uniform_and_the_ends_show_at_true_ends_only() -> None:
    seen = windows(cluster(b"LAGVSERTIDPK"), max_length=8, epochs=7000)
    whole = "<LAGVSERTIDPK>"
    assert_uniform(seen, [whole[start : start + 8] for start in range(7)])
    for end in "<>":
        assert abs(sum(end in window for window in seen) - 1000) < 4 * np.sqrt(7000 / 7 * 6 / 7)


def test_max_length_tokens_are_shown_whole_and_one_more_is_cropped() -> None:
    assert set(windows(cluster(b"LAGVSE"), max_length=8, epochs=200)) == {"<LAGVSE>"}
    assert set(windows(cluster(b"LAGVSER"), max_length=8, epochs=200)) == {"<LAGVSER", "LAGVSER>"}


def test_a_window_lies_within_its_member() -> None:
    some = cluster(b"A" * 20, b"C" * 3, b"D" * 20)
    for window in windows(some, max_length=8, epochs=500):
        assert len(window) <= 8
        assert len(set(window.strip("<>"))) == 1


# The whole draw


def test_a_draw_depends_on_seed_epoch_and_cluster_id_alone() -> None:
    def drawn(seed: int, epoch: int, name: str) -> bytes:
        draw = ClusterDraw(seed, max_length=16, min_length=1, masking=MaskingRule())
        shown(draw, cluster(b"MKV", name="another"), epoch)
        some = cluster(b"LAGVSERTIDPK" * 9, b"YWFM" * 20, name=name)
        return np.concatenate(shown(draw, some, epoch)).tobytes()

    assert drawn(1, 2, "a") == drawn(1, 2, "a")
    assert len({drawn(*key) for key in [(1, 2, "a"), (2, 2, "a"), (1, 3, "a"), (1, 2, "b"), (2, 1, "a")]}) == 5


def test_what_a_key_shows_never_changes() -> None:
    draw = ClusterDraw(seed=17, max_length=8, min_length=1, masking=MaskingRule(fraction=0.5))
    some = cluster(b"LAGVSERTIDPK", b"QNFYMHWCXBUZ", name="UniRef50_A0A009")
    epochs = [shown(draw, some, epoch) for epoch in range(3)]
    inputs = [text(inputs).replace("<mask>", "_") for inputs, _ in epochs]
    assert inputs == ["___YM_WC", "NFYM_WC_", "FY_H__X_"]
    labels = [text(labels).replace("<pad>", ".") for _, labels in epochs]
    assert labels == ["QNF..H..", "....H..X", "..M.WC.B"]


def test_member_window_and_mask_are_independent() -> None:
    draw = ClusterDraw(seed=1, max_length=8, min_length=1, masking=MaskingRule(fraction=0.5))
    some, epochs = cluster(b"LAGVSERTIDPK", b"QNFYMHWCXBUZ"), 4000
    wholes = "<LAGVSERTIDPK>", "<QNFYMHWCXBUZ>"
    columns = []
    for epoch in range(epochs):
        inputs, labels = shown(draw, some, epoch)
        selected = labels != alphabet.PAD
        window = text(np.where(selected, labels, inputs))
        member = int(window in wholes[1])
        columns.append([member, wholes[member].index(window), *selected[1:7]])
    related = np.abs(np.corrcoef(np.array(columns, float).T)) - np.eye(8)
    assert related.max() < 4 / np.sqrt(epochs)


def test_labels_are_what_the_window_shows() -> None:
    some = cluster(b"LAGVSERTIDPK")
    masked = ClusterDraw(seed=1, max_length=8, min_length=1, masking=MaskingRule())
    for epoch, window in enumerate(windows(some, max_length=8, epochs=300)):
        inputs, labels = shown(masked, some, epoch)
        assert text(np.where(labels == alphabet.PAD, inputs, labels)) == window


def test_a_batch_lays_its_sequences_end_to_end_each_as_it_is_alone() -> None:
    some = [
        DRAW.window(cluster(members, name=members.decode()), 0) for members in (b"MKV" * 30, b"LA", b"GVSERT" * 3)
    ]
    alone, batch = [DRAW.collate([each]) for each in some], DRAW.collate(some)
    for key in ("tokens", "labels", "lengths"):
        assert torch.equal(batch[key], torch.cat([each[key] for each in alone]))
    assert batch["lengths"].tolist() == [24, 4, 20]
    assert [batch[key].dtype for key in ("tokens", "labels", "lengths")] == [torch.uint8, torch.uint8, torch.int32]


def test_a_batch_of_nothing_has_the_same_types() -> None:
    batch = DRAW.collate([])
    assert [tuple(batch[key].shape) for key in ("tokens", "labels", "lengths")] == [(0,)] * 3
    assert [batch[key].dtype for key in ("tokens", "labels", "lengths")] == [torch.uint8, torch.uint8, torch.int32]

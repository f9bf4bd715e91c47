"""The convergence figure shows what the logs hold, beside what was published, and says what does not compare."""

import itertools
import math
import os
import re
from pathlib import Path

import plot_convergence
import pytest
from composer.loggers.logger import format_log_data_value
from outcomes import read_scalars
from plot_convergence import (
    PERPLEXITY,
    PUBLISHED,
    PUBLISHED_CONDITIONS,
    Run,
    compare,
    draw,
    read_run,
    ticks_between,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from esm2_composer.data.masking import MaskingRule
from esm2_composer.floors import data_floors
from esm2_composer.recipe.schema import DataSection

CURVE = {0: 34.0, 50: 19.5, 100: 17.25}
CONDITIONS = {**PUBLISHED_CONDITIONS, "global_train_batch_size": 2048, "data.remote": "data/uniref50"}


def write_run(folder: Path, curve=CURVE, settings=CONDITIONS) -> Path:
    """Logs as Composer writes them: a file of scalars, and in a folder below one of hyperparameters."""
    with SummaryWriter(folder) as writer:
        for update, value in curve.items():
            writer.add_scalar(PERPLEXITY, value, update)
            writer.add_scalar("loss/train/total", math.log(value), update)
        logged = {key: format_log_data_value(value) for key, value in settings.items()}
        writer.add_hparams(logged, {f"hparams/{PERPLEXITY}": 1.0}, run_name=folder.name)
    return folder


def test_a_run_is_read_from_any_folder_above_its_logs(tmp_path):
    write_run(tmp_path / "runs/demo/tensorboard/demo")
    for folder in ("runs/demo", "runs/demo/tensorboard", "runs/demo/tensorboard/demo"):
        assert read_run(tmp_path / folder) == Run("demo", CURVE, CONDITIONS)


def test_values_are_those_that_tensorboard_reads(tmp_path):
    write_run(tmp_path, {step: 30 / (step + 1) for step in range(200)})
    theirs = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    for tag in (PERPLEXITY, "loss/train/total"):
        assert read_scalars(tmp_path, tag) == {event.step: event.value for event in theirs.Scalars(tag)}


def test_of_an_update_done_twice_the_later_counts(tmp_path):
    for start, value in ((100.0, 20.0), (300.0, 18.0), (200.0, 19.0)):  # in no order of files
        with SummaryWriter(tmp_path, filename_suffix=str(value)) as writer:
            writer.add_scalar(PERPLEXITY, value, 50, walltime=start)
    assert read_scalars(tmp_path, PERPLEXITY) == {50: 18.0}


def test_what_a_start_did_beyond_where_a_later_one_began_is_dropped(tmp_path):
    starts = {  # by when they began, in another order than that of the files' names
        "c": (100.0, {0: 34.0, 50: 20.0, 100: 18.0, 150: 17.0, 200: 16.0}),
        "a": (200.0, {100: 18.5, 160: 17.5}),
        "b": (300.0, {150: 17.6}),
    }
    for suffix, (began, curve) in starts.items():
        with SummaryWriter(tmp_path, filename_suffix=suffix) as writer:
            for step, value in curve.items():
                writer.add_scalar(PERPLEXITY, value, step, walltime=began + step / 100)
    assert read_run(tmp_path).curve == {0: 34.0, 50: 20.0, 100: 18.5, 150: pytest.approx(17.6)}


def test_event_files_are_read_in_the_order_of_their_names(tmp_path, monkeypatch):
    """By which the settings of the last count, whatever order a folder is listed in."""
    for name in ("1", "2"):
        write_run(tmp_path / name)
    found = [*tmp_path.rglob("events*")]
    for order in (sorted(found), sorted(found, reverse=True)):
        monkeypatch.setattr(Path, "rglob", lambda *_, order=order: iter(order))
        files = [file for file, *_ in plot_convergence.read_events(tmp_path, PERPLEXITY)]
        assert files == sorted(files)


def test_a_record_that_is_still_being_written_is_left_for_later(tmp_path):
    write_run(tmp_path, settings={})
    (file,) = tmp_path.glob("events*")
    whole = file.read_bytes()
    lengths = set()
    for size in range(len(whole) - 120, len(whole)):
        file.write_bytes(whole[:size])
        lengths.add(len(read_scalars(tmp_path, PERPLEXITY)))
    assert lengths == {2, 3}


def test_the_published_curves_are_those_of_the_published_table():
    assert {size: curve[500_000] for size, curve in PUBLISHED.items()} == {"8m": 10.26, "650m": 7.14, "3b": 6.42}
    for curve in PUBLISHED.values():
        assert all(a > b for a, b in itertools.pairwise(curve.values()))


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_published_curves_are_the_points_that_were_read_off(real_data, size):
    facts = real_data.parent / "facts/esm2.md"
    if not facts.exists():
        pytest.skip(f"no {facts}")
    (row,) = re.findall(rf"^\| {size.upper()} \|(( [\d.]+ .?.?\|){{13}})$", facts.read_text(), re.MULTILINE)
    points = [float(number) for number in re.findall(r"[\d.]+", row[0])]
    *curve, last = [PUBLISHED[size][update] for update in sorted(PUBLISHED[size])][-13:]
    assert curve == points[:-1]
    assert last == pytest.approx(points[-1], abs=0.006)  # that of the table


@pytest.mark.parametrize(
    ("settings", "validation", "words"),
    [
        ({}, 328_360, "is comparable with the published curve if validated on the same split"),
        ({}, None, "is comparable with the published curve if validated on the same split"),
        (
            {"data.replacement": "amino_acids"},
            None,
            "not comparable .* data.replacement amino_acids, not all_tokens",
        ),
        ({"data.mask_split": [0.9, 0.1, 0]}, None, "not comparable .* data.mask_split"),
        ({"data.max_length": 512}, None, "not comparable .* data.max_length 512, not 1024"),
        ({}, 1946, "not comparable .* validated on 1,946 other clusters"),
        ({"global_train_batch_size": 32}, None, "updates are of 32 sequences"),
        ({"global_train_batch_size": None}, None, "updates are of an unknown number of sequences"),
    ],
)
def test_it_says_where_a_run_differs_from_the_published_conditions(settings, validation, words):
    run = Run("mine", CURVE, {**CONDITIONS, **settings})
    (note,) = compare(run, run, "8m", validation)
    assert re.search(words, note), note
    assert not list(compare(run, run, None, validation))  # there is nothing to compare it with


def test_it_says_where_runs_differ_and_where_nothing_is_known():
    first = Run("first", CURVE, CONDITIONS)
    (note,) = compare(Run("second", CURVE, {**CONDITIONS, "data.remote": "other"}), first, None, None)
    assert note == "second is not comparable with first: data.remote other, not data/uniref50."
    (note,) = compare(Run("old", CURVE, {"seed": 1}), first, "8m", None)
    assert "its logs do not hold its recipe" in note


def test_the_figure_and_the_table_show_runs_the_published_curve_and_floors(shards, tmp_path, call):
    runs = [
        write_run(
            tmp_path / "demo",
            settings={**CONDITIONS, "data.replacement": "amino_acids", "data.remote": f"{shards}/"},
        ),
        write_run(tmp_path / "other", {10: 21.0, 20: math.inf}),
    ]
    for suffix, magic in ((".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")):
        figure = tmp_path / "figures" / f"curve{suffix}"
        code, out, err = call(plot_convergence.main, *runs, "--reference", "8m", "--data", shards, "--out", figure)
        assert code == 0, err
        assert figure.read_bytes().startswith(magic)
    lines = [line.split() for line in out.splitlines()]
    assert ["update", "demo", "other", "published", "8M"] in lines
    assert ["50", "19.500"] in lines
    assert ["20", "inf"] in lines
    assert ["500,000", "10.260"] in lines
    rules = [MaskingRule(), MaskingRule(replacement="all_tokens")]
    amino_acids, all_tokens = data_floors(DataSection(str(shards)), rules)
    assert [f"{amino_acids['unigram']:.2f}", "unigram"] in lines
    assert [f"{amino_acids['copier']:.2f}", "copier,", "amino_acids"] in lines
    assert [f"{all_tokens['copier']:.2f}", "copier,", "all_tokens"] in lines
    out = " ".join(out.split())
    assert out.count("validated on 10 other clusters") == 1
    assert f"other was validated on data/uniref50; the floors are those of {shards}." in out
    assert "demo was validated on" not in out
    assert sorted(path.name for path in figure.parent.iterdir()) == ["curve.pdf", "curve.png", "curve.svg"]


def test_every_rule_has_its_floor(shards, tmp_path, call):
    splits = ([0.8, 0.1, 0.1], [0.9, 0.1, 0.0], [0.8, 0.1, 0.1])
    runs = []
    for i, split in enumerate(splits, start=1):
        changes = {"data.mask_split": split, "data.mask_fraction": i / 10}
        runs.append(write_run(tmp_path / f"{i}", settings={**CONDITIONS, **changes}))
    code, out, err = call(plot_convergence.main, *runs, "--data", shards)
    assert code == 0, err
    rules = [MaskingRule(split=tuple(split), replacement="all_tokens") for split in splits[:2]]
    floors = data_floors(DataSection(str(shards)), rules)
    lines = [line.split() for line in out.splitlines()]
    assert [line for line in lines if "copier," in line] == [
        [f"{floor['copier']:.2f}", "copier,", split]
        for floor, split in zip(floors, ("80/10/10", "90/10/0"), strict=True)
    ]


def test_floors_are_of_windows_as_long_as_the_first_runs(tmp_path, monkeypatch):
    asked = []

    def floors_of(section: DataSection, rules: list[MaskingRule]) -> list[dict[str, float]]:
        asked.append(section.max_length)
        return [{"unigram": 18.0, "copier": 15.0} for _ in rules]

    monkeypatch.setattr("esm2_composer.floors.data_floors", floors_of)
    (tmp_path / "valid").mkdir()
    (tmp_path / "valid/index.json").write_text('{"shards": []}')
    for settings in ({"data.max_length": 512}, {}):
        runs = [Run("first", CURVE, settings), Run("second", CURVE, {"data.max_length": 256})]
        plot_convergence.read_data(str(tmp_path), None, runs)
    assert asked == [512, 1024]


def test_the_figure_shows_every_point_floor_and_condition():
    """What the table and the lines below it say, but for update 0, for which a logarithmic axis has no place."""
    published = {"published 8M": PUBLISHED["8m"]}
    run = Run("mine", CURVE, {**CONDITIONS, "data.replacement": "amino_acids"})
    notes = [plot_convergence.SOURCE.format(size="8M"), *compare(run, run, "8m", 1946)]
    figure = draw([run], published, {"unigram": 18.2, "copier": 15.3}, notes)
    curves = [dict(zip(*line.get_data(), strict=True)) for line in figure.axes[0].lines[:2]]
    assert curves == [{50: 19.5, 100: 17.25}, PUBLISHED["8m"]]
    assert [set(line.get_ydata()) for line in figure.axes[0].lines[2:]] == [{18.2}, {15.3}]
    labels = {label.get_text() for label in figure.axes[0].texts}
    assert labels == {"mine  17.25", "published 8M  10.26", "unigram  18.20", "copier  15.30"}
    (caption,) = figure.texts
    assert " ".join(caption.get_text().split()) == " ".join(notes)
    assert "328,360 UniRef50 clusters" in notes[0]
    assert "data.replacement amino_acids, not all_tokens; validated on 1,946 other clusters" in notes[1]


def test_a_dollar_in_a_name_is_no_mathematics(tmp_path, call):
    runs = [write_run(tmp_path / name / "demo") for name in ("$a", "$\\b$c")]  # in names, and in the caption
    code, _, err = call(plot_convergence.main, *runs, "--reference", "8m", "--out", tmp_path / "curve.svg")
    assert code == 0, err
    drawn = (tmp_path / "curve.svg").read_text()
    assert all(f"<!-- {run}  17.25 -->" in drawn for run in runs)


def test_many_runs_look_different():
    figure = draw([Run(f"{i}", CURVE, {}) for i in range(12)], {}, {}, [])
    looks = [(line.get_color(), line.get_marker()) for line in figure.axes[0].lines]
    assert len(set(looks)) == len(looks) == 12


@pytest.mark.parametrize("ends", [(12.6, 13.3), (14.0, 34.0), (6.4, 12.0), (8.31, 8.39), (150, 900), (5, 30_000)])
def test_an_axis_has_some_round_numbers(ends):
    ticks = ticks_between(*ends)
    assert 3 <= len(ticks) <= 20
    assert all(ends[0] <= tick <= ends[1] for tick in ticks)
    assert len({f"{tick:,g}" for tick in ticks}) == len(ticks)


def test_runs_of_the_same_name_are_told_apart(tmp_path, call):
    runs = [write_run(tmp_path / folder / "demo") for folder in "ab"]
    code, out, _ = call(plot_convergence.main, *runs)
    assert code == 0
    assert all(str(run) in out for run in runs)


def damaged(folder: Path) -> Path:
    write_run(folder, settings={})
    (file,) = folder.glob("events*")
    content = bytearray(file.read_bytes())
    at = content.index(PERPLEXITY.encode())
    content[at - 12 : at] = b"\xff" * 12  # the lengths of what the record is made of
    file.write_bytes(content)
    return folder


def unreadable(folder: Path, make) -> Path:
    folder.mkdir()
    make(folder / "events.out.tfevents.1")
    return folder


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (lambda tmp: [tmp / "nowhere"], ["nowhere", "no such folder"]),
        (lambda tmp: [write_run(tmp / "a") / next(tmp.glob("a/events*"))], ["events.out", "no such folder"]),
        (lambda tmp: [tmp / ("n" * 300)], ["nnn"]),
        (lambda tmp: [unreadable(tmp / "a", Path.mkdir)], ["tfevents.1", "not a regular file"]),
        (lambda tmp: [unreadable(tmp / "a", os.mkfifo)], ["tfevents.1", "not a regular file"]),
        (lambda tmp: [unreadable(tmp / "a", lambda p: p.symlink_to("x"))], ["tfevents.1", "cannot be read"]),
        (lambda tmp: [write_run(tmp / "a"), "--data", tmp / ("n" * 300)], ["nnn"]),
        (lambda tmp: [write_run(tmp / "a"), "--out", tmp / f"{'n' * 245}.png"], ["cannot be written"]),
        (lambda tmp: [write_run(tmp / "a"), "--out", tmp / f"{'n' * 300}.png"], ["nnn"]),
        (lambda tmp: [tmp], ["no TensorBoard events", PERPLEXITY]),
        (lambda tmp: [write_run(tmp / "a").parent, write_run(tmp / "b").parent], ["several runs", "/a", "/b"]),
        (lambda tmp: [damaged(tmp / "run")], ["events.out", "damaged"]),
        (lambda tmp: [write_run(tmp / "a"), "--out", tmp / "a.jpg"], ["a.jpg", ".png, .pdf or .svg"]),
        (lambda tmp: [write_run(tmp / "a"), "--data", tmp], ["no train shards"]),
        (lambda tmp: [write_run(tmp / "a"), "--data", "s3://bucket/x"], ["needs --local"]),
        (lambda tmp: ["a", "--data", "s3://bucket/x", "--local", "s3://bucket/y"], ["--local is s3://bucket/y"]),
        (lambda tmp: ["a", "--data", tmp, "--local", tmp], ["--local is", "where the shards themselves lie"]),
        (lambda tmp: ["a", "--data", ""], ["what follows --data is empty"]),
        (
            lambda tmp: [write_run(tmp / "a"), "--out", next(tmp.glob("a/events*")) / "y.png"],
            ["cannot be written"],
        ),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(tmp_path, call, arguments, words):
    code, _, err = call(plot_convergence.main, *arguments(tmp_path))
    assert code == 2
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert all(word in err for word in words), err
    assert not list(tmp_path.glob("*.p*"))


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda figure: figure.symlink_to("nothing")])
def test_a_figure_that_exists_stays(tmp_path, call, make):
    run, figure = write_run(tmp_path / "a"), tmp_path / "figure.png"
    make(figure)
    before = os.lstat(figure)
    code, _, err = call(plot_convergence.main, run, "--out", figure)
    assert code == 2
    assert "exists already" in err
    assert os.lstat(figure) == before
    assert sorted(os.listdir(tmp_path)) == ["a", "figure.png"]

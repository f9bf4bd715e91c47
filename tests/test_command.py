"""command.py: what a command that is stopped says, whoever stops it, and its exit code."""

import errno
import os
import signal
import subprocess
import sys

import pytest
import torch

from esm2_composer.command import ArgumentParser, run_command
from esm2_composer.conversion.convert import Interrupted
from esm2_composer.errors import StoreUnavailable


@pytest.fixture(autouse=True)
def handler_is_given_back():
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("stop", "line"),
    [
        (KeyboardInterrupt(), "interrupted\n"),
        (KeyboardInterrupt("the same command goes on"), "interrupted; the same command goes on\n"),
        (SystemExit(130), "interrupted\n"),  # of Composer's handler
    ],
)
def test_ctrl_c_is_one_line_and_a_second_one_ends_it_at_once(capsys, stop, line):
    def main() -> None:
        raise stop

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert (ended.value.code, capsys.readouterr().err) == (130, line)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def test_other_exits_are_left_alone(capsys):
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: sys.exit(2))  # as argparse does
    assert (ended.value.code, capsys.readouterr().err) == (2, "")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("printed", ["'a line'", "'much\\n' * 100_000"])
def test_a_reader_that_leaves_early_is_no_error(printed, unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    command = f"from esm2_composer.command import run_command; run_command(lambda: print({printed}))"
    process = subprocess.Popen([sys.executable, "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()  # as `head` does
    assert process.stderr.read() == b""
    assert process.wait() == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    ("main", "code"),
    [("lambda: 75", 75), ("lambda: tell('a line')", 0), ("lambda: refuse_empty(['--out', ''])", 2)],
)
def test_a_log_that_cannot_be_written_changes_no_code(main, code):
    imports = "from esm2_composer.command import refuse_empty, run_command; from esm2_composer.errors import tell"
    command = f"{imports}; run_command({main})"
    with open("/dev/full", "w") as full:
        assert subprocess.run([sys.executable, "-c", command], stderr=full).returncode == code


@pytest.mark.parametrize("stream", ["1", "2"])
@pytest.mark.parametrize(
    ("main", "code"), [("lambda: print('done')", 0), ("lambda: refuse_empty(['--out', ''])", 2)]
)
def test_a_stream_that_was_closed_at_the_start_changes_no_code(stream, main, code):
    command = f"from esm2_composer.command import refuse_empty, run_command; run_command({main})"
    shell = ["bash", "-c", f'exec "$0" -c "$1" {stream}>&-', sys.executable, command]
    assert subprocess.run(shell, capture_output=True).returncode == code


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_cannot_be_written_is_a_failure(unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    command = "from esm2_composer.command import run_command; run_command(lambda: print('a line'))"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", command], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr


def test_help_that_nobody_reads_is_no_error():
    command = (
        "from esm2_composer.command import ArgumentParser, run_command; run_command(ArgumentParser().parse_args)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", command, "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() in (0, 128 + signal.SIGPIPE)  # argparse passes over what it notices itself


def test_another_pipe_that_breaks_is_told_in_full():
    def main() -> None:
        raise BrokenPipeError(errno.EPIPE, "a worker's")

    with pytest.raises(BrokenPipeError):
        run_command(main)


@pytest.mark.parametrize("path", ["folder", "file/inside", "n" * 300])
def test_a_path_that_the_system_refuses_is_one_line(capsys, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: open(path).close())
    told = capsys.readouterr().err
    assert ended.value.code == 2
    assert told.startswith(f"error: {path}: ")
    assert told.count("\n") == 1


@pytest.mark.parametrize("error", [FileNotFoundError(errno.ENOENT, "", "x"), PermissionError(errno.EPERM, "")])
def test_other_failures_of_the_system_are_told_in_full(error):
    def main() -> None:
        raise error

    with pytest.raises(type(error)):
        run_command(main)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            StoreUnavailable(
                "in a worker\nesm2_composer.errors.StoreUnavailable: s3://bucket/run cannot be reached (no\nroute)"
            ),
            "s3://bucket/run cannot be reached (no route)",
        ),
        (
            Interrupted("No space left on device; the work is kept"),
            "No space left on device; the work is kept",
        ),
    ],
)
def test_what_another_start_may_mend_is_one_line_and_no_mistake(error, line, capsys):
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        run_command(main)
    assert (ended.value.code, capsys.readouterr().err) == (1, f"error: {line}\n")


def test_a_loader_process_that_was_killed_is_one_line(capsys):
    class Batches(torch.utils.data.IterableDataset):
        def __iter__(self):
            os.kill(os.getpid(), signal.SIGKILL)
            yield 0

    with pytest.raises(SystemExit) as ended:
        run_command(lambda: next(iter(torch.utils.data.DataLoader(Batches(), num_workers=1))))
    assert ended.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: DataLoader worker (pid")
    assert "; if for lack of memory, or of room in /dev/shm, give the node more" in line
    with pytest.raises(RuntimeError, match="another"):
        run_command(lambda: (_ for _ in ()).throw(RuntimeError("another")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", ""], "what follows --data is empty"),
        (["--data", " "], "what follows --data is empty"),
        (["--data="], "what follows --data= is empty"),
        ([""], "what follows tool is empty"),
        (["--data", "x", "--wrong"], "unrecognized arguments: --wrong; see --help"),
        (["--data", "x", "--dat", "y"], "unrecognized arguments: --dat y; see --help"),
        ([], "the following arguments are required: --data; see --help"),
    ],
)
def test_empty_and_wrong_arguments_are_one_line(capsys, monkeypatch, arguments, message):
    parser = ArgumentParser()
    parser.add_argument("--data", required=True)
    monkeypatch.setattr(sys, "argv", ["tool", *arguments])
    with pytest.raises(SystemExit) as ended:
        run_command(lambda: parser.parse_args() and None)
    assert (ended.value.code, capsys.readouterr().err) == (2, f"error: {message}\n")

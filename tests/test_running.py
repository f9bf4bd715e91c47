"""Every command, script and manifest in docs/running.md is what it says."""

import contextlib
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

from esm2_composer.errors import EXIT_DIVERGED, EXIT_PREEMPTED
from esm2_composer.preemption import GRACE
from esm2_composer.recipe.config import load_recipe
from esm2_composer.recipe.report import report

TEXT = (ROOT / "docs/running.md").read_text()
SLURM = (ROOT / "docs/jobs/slurm.sh").read_text()
(WARNING,) = re.findall(r"^pkill .*", TEXT, re.MULTILINE)
KUBERNETES = list(yaml.safe_load_all((ROOT / "docs/jobs/kubernetes.yaml").read_text()))
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL) for line in block.splitlines()]


def check_training(words: list[str]) -> None:
    """Its recipe is there and takes the overrides."""
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    assert (ROOT / words[script]).is_file()
    recipe, *rest = words[script + 1 :]
    load_recipe(str(ROOT / recipe), [word for word in rest if re.match(r"[a-z_.]+=", word)], data_is_here=False)


@pytest.mark.parametrize("command", [line for line in COMMANDS if "yamls/" in line])
def test_commands_name_recipes_that_take_their_overrides(command):
    words = shlex.split(command)
    assert words[0] in ("composer", "python", "sbatch")
    check_training(["train.py", *words[3:]] if words[0] == "sbatch" else words)


@pytest.mark.parametrize("script", [SLURM, "\n".join(COMMANDS)], ids=["slurm", "commands"])
def test_shell_is_shell(script):
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, timeout=20)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        *((code, 0, False) for code in (0, 2, EXIT_DIVERGED)),
        *((EXIT_PREEMPTED, 99, True), (1, 0, True), (143, 19, True), (1, 20, False)),
    ],
)
def test_the_slurm_job_requeues_itself_when_told_to_leave_and_a_few_times_when_it_failed(
    code, restarts, requeued, tmp_path
):
    with slurm_job(tmp_path, f"exit {code}", restarts) as job:
        assert job.wait(20) == code
    told = (tmp_path / "told").read_text().splitlines()
    assert told[1].startswith("srun --kill-on-bad-exit=0 --cpus-per-task=96 ")
    assert ("scontrol requeue 17" in told) == requeued


def test_the_slurm_job_passes_its_early_warning_on_and_waits_for_the_save(tmp_path):
    told = tmp_path / "told"
    with slurm_job(
        tmp_path, f"until grep pkill told; do sleep 0.1; done; sleep 1; exit {EXIT_PREEMPTED}", 0
    ) as job:
        while job.poll() is None and "--kill-on-bad-exit" not in (told.read_text() if told.exists() else ""):
            time.sleep(0.1)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(20) == EXIT_PREEMPTED
    *_, warned, requeue = told.read_text().splitlines()
    warning = WARNING.replace("'", "")
    assert (warned, requeue) == (f"srun --overlap --nodes=1 --ntasks=1 {warning}", "scontrol requeue 17")


@pytest.mark.parametrize("given", [(), ("yamls/3b.yaml", "run_name=a trial", "fsdp=null")])
def test_the_slurm_job_trains_what_it_is_given_or_650m(given, tmp_path):
    with slurm_job(tmp_path, 'shift 2; exec "$@"', 0, *given) as job:
        assert job.wait(20) == 0
    (trained,) = (line for line in (tmp_path / "told").read_text().splitlines() if line.startswith("composer "))
    launcher, words = trained.split(" train.py ")
    assert launcher == "composer --nproc 8"
    assert not given or words == " ".join(given)
    check_training(["train.py", *(given or words.split())])


@contextlib.contextmanager
def slurm_job(folder: Path, then: str, restarts: int, *arguments: str) -> Iterator[subprocess.Popen]:
    """The script itself, where commands write down what they are told, and srun of the run does `then`."""
    srun = f'case "$1" in --kill*) {then} ;; esac'
    for name, words, last in (
        *(("srun", "$*", srun), ("scontrol", "$1 $2", "")),
        *(("composer", "$*", ""), ("mkdir", "$*", "")),
    ):
        (folder / name).write_text(f'#!/bin/bash\necho {name} "{words}" | head -n 1 >> told\n{last}\n')
        (folder / name).chmod(0o755)
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").write_text(f"PATH={folder}:$PATH\n")
    slurm = {"JOB_ID": "17", "JOB_NUM_NODES": "8", "JOB_NODELIST": "n[1-8]", "CPUS_PER_TASK": "96"}
    slurm |= {"RESTART_COUNT": str(restarts), "NODEID": "0"}
    environment = {**os.environ, "USER": "me", **{f"SLURM_{name}": value for name, value in slurm.items()}}
    command = ["bash", ROOT / "docs/jobs/slurm.sh", *arguments]
    with subprocess.Popen(command, cwd=folder, env=environment) as job:
        try:
            yield job
        finally:
            job.kill()


def test_the_slurm_job_is_warned_in_time_and_its_inner_script_is_shell():
    assert int(re.search(r"--signal=B:USR1@(\d+)", SLURM)[1]) > GRACE
    inner = re.search(r"bash -c '(.*?)'", SLURM, re.DOTALL)[1]
    assert subprocess.run(["bash", "-n"], input=inner, text=True, timeout=20).returncode == 0


def test_the_kubernetes_job_goes_on_when_told_to_leave_and_ends_on_mistakes():
    service, job = KUBERNETES
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    rules = [rule for rule in job["spec"]["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    assert {rule["action"]: rule["onExitCodes"]["values"] for rule in rules} == {
        "FailJob": [2, EXIT_DIVERGED],
        "Ignore": [EXIT_PREEMPTED],
    }
    assert pod["restartPolicy"] == "Never"  # without which there is no podFailurePolicy
    ((warn, wait),) = re.findall(r"(.*) && sleep (\d+)$", container["lifecycle"]["preStop"]["exec"]["command"][2])
    assert warn == WARNING
    assert pod["terminationGracePeriodSeconds"] > int(wait) + GRACE
    check_training([*container["command"], *container["args"]])
    environment = {entry["name"]: entry.get("value") for entry in container["env"]}
    gpus = int(container["command"][2])
    assert int(environment["WORLD_SIZE"]) == gpus * job["spec"]["completions"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == gpus
    name = job["metadata"]["name"]
    assert environment["MASTER_ADDR"] == f"{name}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/dev/shm", "/cache"}
    assert environment["TMPDIR"] == "/cache", "a folder that nobody makes is not taken"


@pytest.mark.parametrize("python", ["python", "/opt/venv/bin/python3", "/usr/bin/python3.11"])
def test_the_early_warning_goes_to_a_rank_and_not_to_the_launcher(python):
    (pattern,) = re.findall(r"--full '(.*)'", WARNING)
    assert re.search(pattern, f"{python} train.py yamls/650m.yaml")
    assert re.search(pattern, f"{python} /workspace/train.py yamls/650m.yaml")
    assert not re.search(pattern, f"{python} /opt/venv/bin/composer --nproc 8 train.py yamls/650m.yaml")
    assert not re.search(pattern, f"{python} /opt/venv/bin/composer train.py yamls/650m.yaml")


@pytest.mark.parametrize(
    ("size", "overrides", "row"),
    re.findall(r"^\| (\w+)(?:, `(.*?)`)? \| (\d+ [AH]100 \| .*) \|$", TEXT, re.MULTILINE),
    ids=lambda part: part[:4],
)
def test_the_plans_that_are_told_are_those_of_the_tool(size, overrides, row):
    gpus, gpu = row.split(" | ")[0].split()
    recipe = load_recipe(str(ROOT / f"yamls/{size.lower()}.yaml"), overrides.split(), data_is_here=False)
    _, plan = report(recipe, int(gpus), gpu.lower())
    keys = "step", "compute", "communication", "launching"
    step, compute, communication, launching = (plan[f"{key}_seconds"] for key in keys)
    assert row.split(" | ")[1:] == [
        f"{step:.3f} s: {compute:.3f}, {communication:.3f}, {launching:.3f}",
        *(f"{plan['days']:.2f} days", f"{plan['gpu_hours']:,.0f}", str(plan["useful_gpus"])),
    ]


def test_what_fits_one_gpu_is_what_the_plan_finds():
    def change(size: str, gpus: int, *overrides: str) -> str | None:
        recipe = load_recipe(str(ROOT / f"yamls/{size}.yaml"), overrides, data_is_here=False)
        return report(recipe, gpus, "h100")[1]["change"]

    told = " ".join(TEXT.split())
    (smaller,) = re.findall(
        r"On one 80 GB GPU all recipes up to 650M fit as they are, 3B with `(.*?)`; 15B needs eight", told
    )
    assert [change(size, 1) for size in ("8m", "35m", "150m", "650m")] == [None] * 4
    assert change("3b", 1) == smaller
    assert change("3b", 1, smaller) is None
    assert [change("15b", gpus) is None for gpus in (4, 8)] == [False, True]


def test_the_keys_that_may_change_are_told():
    from esm2_composer.recipe.config import MAY_CHANGE

    row = next(line for line in TEXT.splitlines() if line.startswith("| the number of ranks"))
    told = row.split("|")[1]
    for key in ("fsdp", "device_microbatch_tokens", "precision", "compile", "model.attention", "max_duration"):
        assert key in MAY_CHANGE
        assert f"`{key}" in told

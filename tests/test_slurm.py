"""The batch scripts, run with stand-ins for Slurm's commands: what they start and queue again."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import runs

ROOT = Path(__file__).resolve().parent.parent

# srun runs its command as often as --ntasks says, as Slurm would on all nodes.
TOOLS = {"srun": """echo "srun $*" >> "$CALLS"
while [[ "$1" == --* ]]; do
    case "$1" in --ntasks=*) tasks=${1#*=};; --ntasks-per-node=*) each=${1#*=};; esac
    shift
done
for ((i = 0; i < tasks; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$((i % ${each:-1})) SLURM_NTASKS=$tasks "$@" || code=$?
done
exit ${code:-0}""",
         "scontrol": """[ "$1" = show ] && { printf 'n1\\nn2\\n'; exit; }
echo "scontrol $*" >> "$CALLS\"""",
         "sbatch": 'printf "%s|" sbatch "$@" >> "$CALLS"; echo >> "$CALLS"',
         "python": f'exec "{sys.executable}" "$@"'}
TOY = '''"""Stands for a training script."""
import json, os
from dataclasses import dataclass
import runs

@dataclass(frozen=True)
class Config:
    experiment: str = "toy"
    output_base_dir: str = "."
    code: int = 0
    note: str = ""
    shard: str = ""

def main(config, files, check=False):
    if config.note == "bad":
        raise ValueError("note=bad: the check says no")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    print(json.dumps([check, files, config.note, config.shard, *map(os.environ.get, names)]))
    return config.code

runs.script(__doc__, Config, main) if __name__ == "__main__" else None
'''
JOB = dict(SLURM_JOB_ID="4711", SLURM_SUBMIT_DIR=".", SLURM_JOB_NUM_NODES="1",
           SLURM_GPUS_ON_NODE="1",
           SLURM_CPUS_ON_NODE="16", SLURM_JOB_NODELIST="n[1-2]")
SHARD = dict(SLURM_ARRAY_JOB_ID="17", SLURM_ARRAY_TASK_ID="3", SLURM_ARRAY_TASK_MIN="1",
             SLURM_ARRAY_TASK_MAX="4",
             SLURM_ARRAY_TASK_COUNT="4", SLURM_SUBMIT_DIR=".")


@pytest.fixture
def place(tmp_path):
    """A repository of one script, and run(script, *arguments, **environment) with stand-ins."""
    (tmp_path / "bin").mkdir()
    for name, text in TOOLS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    home = tmp_path / "home"
    (home / "slurm").mkdir(parents=True)
    for name in ("slurm/train.sh", "slurm/array.sh", "runs.py"):
        (home / name).write_bytes((ROOT / name).read_bytes())
    (home / "toy.py").write_text(TOY)
    (home / "toy.yaml").write_text("experiment: toy_run\n")

    def run(script, *arguments, **environment):
        there = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
                 "CALLS": str(tmp_path / "calls"), **environment}
        done = subprocess.run(["bash", f"slurm/{script}", *arguments], cwd=home, env=there,
                              capture_output=True, text=True)
        (tmp_path / "calls").touch()
        calls = (tmp_path / "calls").read_text().splitlines()
        (tmp_path / "calls").unlink()
        return done, calls
    return home, run


def test_one_process_for_each_gpu_and_all_it_says_in_the_run_folder(place):
    home, run = place
    note = "two words = $HOME *"
    done, calls = run("train.sh", "toy.py", "toy.yaml", f"note={note}", "output_base_dir=else", **{
        **JOB, "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_ON_NODE": "64"})
    log = home / "else/runs/toy_run/logs/slurm-4711.log"
    assert (done.returncode, done.stdout, done.stderr) == (0, f"log: {log.relative_to(home)}\n", "")
    assert {"--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=32",
            "--kill-on-bad-exit=0"} <= set(calls[0].split())
    lines = log.read_text().splitlines()
    assert lines == [f'[false, [], "{note}", "", "{i}", "{i % 2}", "4", "n1", "24711"]'
                     for i in range(4)]
    run("train.sh", "toy.py", "toy.yaml", "output_base_dir=else",
        **JOB)           # queued again under the same number
    assert len(log.read_text().splitlines()) == 5


@pytest.mark.parametrize("code", [0, 1, runs.REQUEUE])
def test_only_what_was_saved_is_queued_again(place, code):
    _, run = place
    for script, job, name in (("train.sh", JOB, "4711"), ("array.sh", SHARD, "17_3")):
        done, calls = run(script, "toy.py", "toy.yaml", f"code={code}", **job)
        assert done.returncode == code
        assert calls[1:] == ([f"scontrol requeue {name}"] if code == runs.REQUEUE else [])


def test_each_job_of_an_array_has_its_shard(place):
    _, run = place
    assert '"a b", "3/4"' in run("array.sh", "toy.py", "toy.yaml", "note=a b", **SHARD)[0].stdout
    alone = {**SHARD, "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "3",
             "SLURM_ARRAY_TASK_COUNT": "1"}
    assert "say SHARDS=n" in run("array.sh", "toy.py", "toy.yaml", **alone)[0].stdout
    assert '"3/16"' in run("array.sh", "toy.py", "toy.yaml", SHARDS="16", **alone)[0].stdout


@pytest.mark.parametrize("script, flags, logs", [
    ("train.sh", ("--nodes=2", "--mem=256G"), "runs/toy_run/logs/slurm-%j.log"),
    ("train.sh", (), "runs/toy_run/logs/slurm-%j.log"),
    ("array.sh", ("--array=1-16", "--gres=gpu:a40:1"), "runs/toy/logs/%A_%a.log")])
def test_on_the_login_node_they_check_and_submit(place, script, flags, logs):
    home, run = place
    done, calls = run(script, *flags, "toy.py", "toy.yaml", "note=two words")
    assert done.returncode == 0 and done.stdout.startswith("[true, [], ")
    assert (home / logs).parent.is_dir()
    words = ["sbatch", f"--output={logs}", *flags, f"slurm/{script}", "toy.py", "toy.yaml",
             "note=two words"]
    assert calls == ["|".join(words) + "|"]


@pytest.mark.parametrize("words, said", [
    ("train.sh toy.py toy.yaml note=bad", "error: note=bad: the check says no"),
    ("train.sh toy.py toy.yaml nots=1", "error: nots=1: unknown key 'nots', did you mean 'note'?"),
    ("train.sh toy.py", "usage: slurm/train.sh"),
    ("train.sh gone.py toy.yaml", "error: gone.py is not in "),
    ("array.sh --array=1-4 toy.py toy.yaml note=bad", "the check says no"),
    ("array.sh toy.py toy.yaml", "error: no job array; usage: slurm/array.sh --array=1-16"),
    ("array.sh --mem=64G --array 1-4 toy.py toy.yaml", "write --array=1-4"),
    ("array.sh --mem=64G -a 1-4 toy.py toy.yaml", "write --array=1-4"),
    ("array.sh --array=1-4 gone.py x", "error: gone.py is not in "),
    ("array.sh --array=0-15 toy.py toy.yaml", "error: --array does not run from 1 to n"),
    ("array.sh --array=1-4 toy.py toy.yaml overwrite=true", "error: overwrite=true would begin")])
def test_mistakes_are_not_submitted(place, words, said):
    _, run = place
    done, calls = run(*words.split())
    assert done.returncode in (1, 2) and calls == []
    assert said in done.stdout + done.stderr and "Traceback" not in done.stderr


def test_a_job_is_warned_queued_again_and_has_a_log():
    for script in ("train.sh", "array.sh"):
        text = (ROOT / "slurm" / script).read_text()
        asked = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
        assert asked["signal"] == "USR1@120" and "requeue" in asked
        assert asked["open-mode"] == "append"
        assert "/" not in asked["output"]      # Slurm makes no folder: a job without one just fails
        named = re.findall(r"(?<=\.py )(?:\w+ )?(configs/\w+\.yaml)", text)
        assert named and all((ROOT / path).is_file() for path in named)


def test_the_image_has_all_that_the_tests_read():
    """README's second command runs in it; docs/logs was left out. Only what git ignores may be."""
    left, ignored = ((ROOT / name).read_text().split() for name in (".dockerignore", ".gitignore"))
    names = {line.strip("*/") for line in ignored}
    assert ".git" in left and {line.strip("*/") for line in left} - {".git"} <= names

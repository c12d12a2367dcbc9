"""The batch scripts, run with stand-ins for Slurm's commands: what they start, print, and queue again."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import runs

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train.sh", "array.sh")

# Runs its command as often as --ntasks says, as Slurm would on all nodes, and returns the highest exit code.
SRUN = """echo "srun $*" >> "$CALLS"
tasks=1; each=1
while [[ "$1" == --* ]]; do
    case "$1" in --ntasks=*) tasks=${1#*=};; --ntasks-per-node=*) each=${1#*=};; esac
    shift
done
worst=0
for ((i = 0; i < tasks; i++)); do
    SLURM_PROCID=$i SLURM_LOCALID=$((i % each)) SLURM_NTASKS=$tasks "$@"
    code=$?; [ $code -gt $worst ] && worst=$code
done
exit $worst"""
SCONTROL = """[ "$1" = show ] && { printf 'n1\\nn2\\n'; exit; }
echo "scontrol $*" >> "$CALLS\""""
SBATCH = 'printf "%s|" sbatch "$@" >> "$CALLS"; echo >> "$CALLS"'

TOY = '''"""Stands for a training script."""
import json, os, sys
from dataclasses import dataclass
import runs

@dataclass(frozen=True)
class Config:
    experiment: str = "toy"
    output_base_dir: str = "."
    code: int = 0
    note: str = ""

def main(config, files, check=False):
    if check and config.note == "bad":
        raise ValueError("note=bad: the check says no")
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    print(json.dumps([check, files, config.note, *(os.environ.get(name) for name in names)]))
    return config.code

runs.script(__doc__, Config, main) if __name__ == "__main__" else None
'''


@pytest.fixture
def place(tmp_path):
    """A repository of one script, a folder with Slurm's commands, and run(script, *arguments, **environment)."""
    tools = {"srun": SRUN, "scontrol": SCONTROL, "sbatch": SBATCH, "python": f'exec "{sys.executable}" "$@"'}
    (tmp_path / "bin").mkdir()
    for name, text in tools.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    home = tmp_path / "home"
    (home / "slurm").mkdir(parents=True)
    for name in SCRIPTS:
        (home / "slurm" / name).write_bytes((ROOT / "slurm" / name).read_bytes())
    (home / "runs.py").write_bytes((ROOT / "runs.py").read_bytes())
    (home / "toy.py").write_text(TOY)
    (home / "toy.yaml").write_text("experiment: toy_run\n")

    def run(script, *arguments, **environment):
        there = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), **environment}
        done = subprocess.run(["bash", f"slurm/{script}", *arguments], cwd=home, env=there, capture_output=True, text=True)
        calls = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        (tmp_path / "calls").unlink(missing_ok=True)
        return done, calls
    return home, run


def job(nodes=1, gpus=1, cpus=16):
    return dict(SLURM_JOB_ID="4711", SLURM_SUBMIT_DIR=".", SLURM_JOB_NUM_NODES=str(nodes), SLURM_GPUS_ON_NODE=str(gpus),
                SLURM_CPUS_ON_NODE=str(cpus), SLURM_JOB_NODELIST="n[1-2]")


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_understands_the_scripts(script):
    subprocess.run(["bash", "-n", str(ROOT / "slurm" / script)], check=True)


# ------------------------------------------------------------------------------------------------ train.sh

def test_arguments_reach_the_script_and_its_log_the_run_folder(place):
    home, run = place
    done, calls = run("train.sh", "toy.py", "toy.yaml", "note=two words = $HOME *", **job())
    assert done.returncode == 0 and done.stdout == "log: runs/toy_run/logs/slurm-4711.log\n" and done.stderr == ""
    log = home / "runs/toy_run/logs/slurm-4711.log"
    assert log.read_text() == '[false, [], "two words = $HOME *", "0", "0", "1", "n1", "24711"]\n'
    assert len(calls) == 1 and "--ntasks=1 " in calls[0] and "--cpus-per-task=16 " in calls[0]
    run("train.sh", "toy.py", "toy.yaml", "note=again", **job())                  # queued again under the same number
    assert len(log.read_text().splitlines()) == 2


def test_the_run_folder_follows_the_configuration(place):
    home, run = place
    run("train.sh", "toy.py", "toy.yaml", "experiment=other", "output_base_dir=elsewhere", **job())
    assert (home / "elsewhere/runs/other/logs/slurm-4711.log").exists() and not (home / "runs").exists()


def test_one_process_for_each_gpu_of_each_node(place):
    home, run = place
    done, calls = run("train.sh", "toy.py", "toy.yaml", **job(nodes=2, gpus=4, cpus=64))
    assert done.returncode == 0
    assert {"--ntasks=8", "--ntasks-per-node=4", "--cpus-per-task=16", "--kill-on-bad-exit=0"} <= set(calls[0].split())
    lines = (home / "runs/toy_run/logs/slurm-4711.log").read_text().splitlines()
    assert lines == [f'[false, [], "", "{i}", "{i % 4}", "8", "n1", "24711"]' for i in range(8)]


@pytest.mark.parametrize("code", [0, 1, 2, 130, 137, runs.REQUEUE])
def test_only_a_saved_job_is_queued_again(place, code):
    _, run = place
    done, calls = run("train.sh", "toy.py", "toy.yaml", f"code={code}", **job())
    assert done.returncode == code
    assert calls[1:] == (["scontrol requeue 4711"] if code == 85 else [])


def test_on_the_login_node_it_checks_and_submits(place):
    _, run = place
    flags = ("--nodes=2", "--gres=gpu:a40:4", "--mem=256G")
    done, calls = run("train.sh", *flags, "toy.py", "toy.yaml", "note=two words")
    assert done.returncode == 0 and done.stdout.startswith("[true, [], ")
    words = ["sbatch", "--output=runs/toy_run/logs/slurm-%j.log", *flags, "slurm/train.sh",
             "toy.py", "toy.yaml", "note=two words"]
    assert calls == ["|".join(words) + "|"]
    done, calls = run("train.sh", "toy.py", "toy.yaml")                            # no flag at all
    assert calls == ["sbatch|--output=runs/toy_run/logs/slurm-%j.log|slurm/train.sh|toy.py|toy.yaml|"]


@pytest.mark.parametrize("words,said", [
    (("toy.py", "toy.yaml", "note=bad"), "error: note=bad: the check says no"),
    (("toy.py", "toy.yaml", "nots=1"), "error: nots=1: unknown key 'nots', did you mean 'note'?"),
    (("toy.py", "gone.yaml"), "error: gone.yaml: no such configuration"),
    (("toy.py",), "usage: slurm/train.sh"), ((), "usage: slurm/train.sh"),
    (("gone.py", "toy.yaml"), "error: gone.py is not in ")])
def test_mistakes_are_not_submitted(place, words, said):
    _, run = place
    done, calls = run("train.sh", *words)
    assert done.returncode in (1, 2) and calls == []
    assert said in done.stdout + done.stderr and "Traceback" not in done.stderr


def header(script):
    return dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", (ROOT / "slurm" / script).read_text(), re.MULTILINE))


def test_what_a_job_asks_for_by_default():
    asked = header("train.sh")
    assert asked["gres"] == "gpu:a100:1" and asked["nodes"] == "1" and asked["time"] == "56:00:00"
    assert asked["signal"] == "USR1@120" and "requeue" in asked and asked["open-mode"] == "append"
    assert "/" not in asked["output"]                         # Slurm makes no folder: a job without one just fails
    assert os.access(ROOT / "slurm/train.sh", os.X_OK)
    comment = (ROOT / "slurm/train.sh").read_text().split("#SBATCH")[0]
    for flag in ("--nodes=2", "--gres=gpu:a100:4", "--gres=gpu:a40:1", "--mem=", "--cpus-per-task=", "--time=",
                 "--partition="):
        assert flag in comment
    named = re.findall(r"(\w+\.py) (configs/\w+\.yaml)", comment)
    assert named and all((ROOT / path).is_file() for pair in named for path in pair)


# ------------------------------------------------------------------------------------------------ array.sh

def shard(number, count=4):
    return dict(SLURM_ARRAY_JOB_ID="17", SLURM_ARRAY_TASK_ID=str(number), SLURM_ARRAY_TASK_MIN="1",
                SLURM_ARRAY_TASK_MAX=str(count), SLURM_ARRAY_TASK_COUNT=str(count), SLURM_SUBMIT_DIR=".")


def test_every_shard_of_an_array_once(place):
    home, run = place
    (home / "say.py").write_text("import sys\nprint(*sys.argv[1:], sep='|')\n")
    said = [run("array.sh", "say.py", "infer", "c.yaml", "note=two words", **shard(i))[0].stdout for i in (1, 2, 3, 4)]
    assert said == [f"infer|c.yaml|note=two words|shard={i}/4\n" for i in (1, 2, 3, 4)]


def test_a_shard_alone_must_know_of_how_many_it_is_one(place):
    home, run = place
    (home / "say.py").write_text("import sys\nprint(*sys.argv[1:])\n")
    alone = {**shard(3, 1), "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_MAX": "3"}
    refused = run("array.sh", "say.py", "c.yaml", **alone)[0]
    assert refused.returncode == 2 and "say SHARDS=n" in refused.stdout
    assert run("array.sh", "say.py", "c.yaml", **alone, SHARDS="4")[0].stdout == "c.yaml shard=3/4\n"


def test_an_array_is_checked_and_submitted(place):
    home, run = place
    flags = ("--array=1-16", "--gres=gpu:a40:1")
    done, calls = run("array.sh", *flags, "toy.py", "toy.yaml", "note=two words")
    assert done.returncode == 0 and done.stdout.startswith("[true, [], ") and (home / "runs/toy/logs").is_dir()
    assert calls == ["|".join(("sbatch", "--output=runs/toy/logs/%A_%a.log", *flags, "slurm/array.sh", "toy.py",
                               "toy.yaml", "note=two words")) + "|"]
    for words, said in ((("--array=1-4", "toy.py", "toy.yaml", "note=bad"), "the check says no"),
                        (("toy.py", "toy.yaml"), "error: no job array; usage: slurm/array.sh --array=1-16"),
                        (("--array=1-4", "gone.py", "x"), "error: gone.py is not in "), (("--array=1-4",), "usage:")):
        done, calls = run("array.sh", *words)
        assert done.returncode in (1, 2) and calls == [] and said in done.stdout + done.stderr


@pytest.mark.parametrize("code", [0, 1, 137, runs.REQUEUE])
def test_only_a_stopped_shard_is_queued_again(place, code):
    home, run = place
    (home / "say.py").write_text(f"raise SystemExit({code})\n")
    done, calls = run("array.sh", "say.py", "c.yaml", **shard(3))
    assert done.returncode == code
    assert calls[1:] == (["scontrol requeue 17_3"] if code == 85 else [])


# Stands for train_ssl.py, train_seg.py: says its rate, works a tenth of a second a step, goes on, stops at Slurm's signal.
TRAINS = '''
import pathlib, signal, sys, time
config, *rest = sys.argv[1:]
name = next(l.split()[1] for l in open(config) if l.startswith("experiment:"))
if "--check" in rest:
    print("0.100 s a step on cpu (1% of it crops): so many steps")
    print("then 2 decoders (one, two), 4 steps in all" * (name == "b"))
    sys.exit(0)
given = dict(word.split("=") for word in rest)
stop = []
signal.signal(signal.SIGUSR1, lambda *_: stop.append(1))
weights, at = pathlib.Path(f"final_models/{name}.pt"), pathlib.Path(f"runs/{name}")
at.mkdir(parents=True, exist_ok=True)
weights.parent.mkdir(exist_ok=True)
seen = at / "step"
for step in range(int(seen.read_text()) if seen.exists() else 0, int(given["steps"])):
    time.sleep(0.1)
    seen.write_text(str(step + 1))
    weights.write_bytes(b"x" * 40)
    (at / "log.jsonl").write_text("{}")
    if stop:
        sys.exit(85)
print(name, "ends", given)
'''


def test_legs_go_on_and_each_leaves_weights(tmp_path):
    (tmp_path / "slurm").mkdir()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/results.md").write_text("table")
    (tmp_path / "slurm/legs.sh").write_bytes((ROOT / "slurm/legs.sh").read_bytes())
    for name in ("train_ssl.py", "train_seg.py"):
        (tmp_path / name).write_text(TRAINS)
    for name in ("a", "b"):
        (tmp_path / f"{name}.yaml").write_text(f"experiment: {name}\nwarmup: 3\n")

    def leg(seconds, *arguments):
        return subprocess.run(["bash", "slurm/legs.sh", str(seconds), *arguments], cwd=tmp_path, capture_output=True, text=True,
                              env={**os.environ, "SSL": "a.yaml", "SEG": "b.yaml", "PRETRAIN": "4", "TRAIN": "2",
                                   "MEASURE": "no", "PYTHON": sys.executable})

    assert leg(4, "out").returncode == 85                     # too short for anything but the count of steps
    assert (tmp_path / "runs/legs/a.steps").read_text() == "40\n"
    (tmp_path / "runs/legs/a.steps").write_text("200")        # 20 s: more than one leg
    stopped = leg(8, "out")
    assert stopped.returncode == 85 and "leg over in a" in stopped.stdout, stopped.stderr
    assert (tmp_path / "out/a.pt.00").read_bytes() == b"x" * 40 and (tmp_path / "out/a.jsonl").exists()
    assert 40 < int((tmp_path / "runs/a/step").read_text()) < 100
    (tmp_path / "runs/a/step").write_text("199")
    last = leg(20, "out", "data.root=here")
    assert last.returncode == 0, last.stdout + last.stderr
    assert re.search(r"a ends \{'steps': '200', 'data.root': 'here'\}", last.stdout)
    assert re.search(r"b ends \{'steps': '16', 'init': 'final_models/a.pt', 'data.root': 'here'\}", last.stdout)
    assert sorted(p.name for p in (tmp_path / "out").glob("*.pt.*")) == ["a.pt.00", "b.pt.00"]
    again = leg(8)
    assert again.returncode == 0 and "ends" not in again.stdout
    assert leg("soon").returncode == 2

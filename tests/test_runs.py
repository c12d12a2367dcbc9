"""runs.py: configurations go round, and every mistake is one line that says what to do."""
import dataclasses
import functools
import math
import os
import signal
import subprocess
import sys
import threading
import types
from dataclasses import dataclass, field
from typing import Literal

import pytest
import torch
from conftest import ROOT

import infer
import runs


@dataclass(frozen=True)
class Inner:
    root: str = "dat"                       # where
    channels: tuple[int, ...] = (1, 2)      # which


@dataclass(frozen=True)
class Demo:
    steps: int                              # optimiser steps
    lr: float = 1e-4                        # per step
    device: Literal["auto", "cpu"] = "auto"  # where it runs
    cap: float | None = None                # px
    flip: bool = False                      # mirror
    name: str = "x"                         # text
    data: Inner = field(default_factory=Inner)
    other: Inner | None = None              # more of it

    def __post_init__(self):
        if self.cap is not None and self.cap <= 0:
            raise ValueError(f"cap={self.cap}: expected more than 0 px")


def write(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    return path


@pytest.mark.smoke
def test_yaml_and_overrides_and_back(tmp_path):
    path = write(tmp_path, "steps: 10\nlr: 3e-4\ndata:\n  channels: [3]\n")
    config = runs.load_config(Demo, path, ["data.root=/x", "cap=4", "flip=true", "name=7",
                                           "steps=1e3"])
    assert config == Demo(1000, 3e-4, "auto", 4.0, True, "7", Inner("/x", (3,)))
    assert isinstance(config.lr, float) and isinstance(config.steps, int)
    assert runs.load_config(Demo, write(tmp_path, runs.to_yaml(config))) == config


def test_what_is_no_yaml_is_meant_as_text():
    config = runs.load_config(Demo, None, ["steps=1", "name=a: b", "data.root=@405"])
    assert config.name == "a: b" and config.data.root == "@405"
    assert runs.load_config(infer.Config, None, ["channels=%DAPI,@405"]).channels == (
        "%DAPI", "@405")


def test_lists_and_null_on_the_command_line():
    config = runs.load_config(Demo, None, ["steps=1", "data.channels=4,5", "cap=null",
                                           "device=cpu"])
    assert config.data.channels == (4, 5) and config.cap is None and config.device == "cpu"


def test_a_free_section_takes_values_at_any_depth(tmp_path):
    @dataclass(frozen=True)
    class Free:
        variants: dict = field(default_factory=dict)
    path = write(tmp_path, "variants: {a: {lr: 1.0e-3}, b: {}}")
    config = runs.load_config(Free, path, ["variants.b.init=x.pt", "variants.a.network.stem=0"])
    assert config.variants == {"a": {"lr": 1e-3, "network": {"stem": 0}}, "b": {"init": "x.pt"}}
    assert "init: x.pt" in runs.to_yaml(config)


def test_a_section_given_by_its_first_key_takes_others():
    config = runs.load_config(Demo, None, ["steps=3", "data=a", "data.root=b"])
    assert config.data == dataclasses.replace(config.data, root="b") != Demo(3).data
    for arguments in (["data.channels=5", "data=a"], ["data={root: a}", "data.channels=5"]):
        assert runs.load_config(Demo, None, ["steps=3", *arguments]).data == Inner("a", (5,))
    assert runs.load_config(Demo, None, ["steps=3", "other=a"]).other == Inner("a")
    assert runs.load_config(Demo, None, ["steps=3", "other=null"]).other is None


def test_a_name_of_a_run_stays_below_its_folder():
    @dataclass(frozen=True)
    class Named:
        experiment: runs.Name = "x"

    for name in ("a", "a/b", "a.b", "..."):
        assert runs.load_config(Named, None, [f"experiment={name}"]).experiment == name
    for name in ("", "..", "../x", "a/../b", "/a", "a/", ".", "a\\..\\b"):
        with pytest.raises(ValueError, match="text, the name of a folder"):
            runs.load_config(Named, None, [f"experiment={name}"])


@pytest.mark.smoke
@pytest.mark.parametrize("text,overrides,said", [
    ("stpes: 3", [], "c.yaml: unknown key 'stpes', did you mean 'steps'?"),
    ("steps: 3\ndata: {rot: 1}", [], "c.yaml: unknown key 'data.rot', did you mean 'root'?"),
    ("steps: 3\nother: {rot: 1}", [], "c.yaml: unknown key 'other.rot', did you mean 'root'?"),
    ("steps: 3", ["other.channels=x"], "other.channels is 'x', expected a whole number"),
    ("steps: 3\nother: 4", [], "c.yaml: other is 4, expected a section with keys"),
    ("lr: 3", [], "c.yaml: key 'steps' is missing"),
    ("steps: many", [], "c.yaml: steps is 'many', expected a whole number"),
    ("steps: 1.5", [], "c.yaml: steps is 1.5, expected a whole number"),
    ("steps: true", [], "c.yaml: steps is True, expected a whole number"),
    ("steps: 3\nflip: 1", [], "c.yaml: flip is 1, expected true or false"),
    ("steps: 3\ndevice: gpu", [], "c.yaml: device is 'gpu', expected auto or cpu"),
    ("steps: 3\ndata: 4", [], "c.yaml: data is 4, expected a section with keys"),
    ("steps: 3\ncap: -1", [], "c.yaml: cap=-1.0: expected more than 0 px"),
    ("steps: 3", ["cap=wide"], "cap=wide: expected a number or null"),
    ("steps: 3", ["zzz=1"], "zzz=1: unknown key 'zzz'; known keys: steps, lr"),
    ("steps: 3", ["steps.a=1"], "steps.a=1: 'steps' is a value"),
    ("- 1\n- 2", [], "c.yaml: got a list, expected lines `key: value`"),
    ("steps: [1", [], "c.yaml: not valid YAML in line 1"),
])
def test_mistakes_are_named(tmp_path, text, overrides, said):
    with pytest.raises(ValueError) as error:
        runs.load_config(Demo, write(tmp_path, text), overrides)
    assert said in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.yaml: no such configuration"):
        runs.load_config(Demo, tmp_path / "gone.yaml")


def test_what_exists_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.tif").touch()
    assert runs.split_arguments(["a=b.tif", "img.tif", "out=x", "data.root=y"]) == (
        ["a=b.tif", "img.tif"],
        ["out=x", "data.root=y"],
    )


def test_describe_lists_every_key_with_its_comment():
    text = runs.config_help(Demo)
    assert (
        "steps=..." in text
        and "optimiser steps" in text
        and "device=auto" in text
        and "flip=false" in text
    )


def test_script_ends_in_one_line_and_a_code(tmp_path):
    script = tmp_path / "s.py"
    script.write_text(
        f"'''Says hello.'''\nimport sys; sys.path.insert(0, {str(ROOT)!r})\nimport runs\n"
        "from dataclasses import dataclass\n@dataclass(frozen=True)\nclass C:\n    n: int = 1   # "
        "times\n"
        "def main(config, files):\n    if config.n == 3: open('no/such/file')\n    print('hello', "
        "config.n, files)\n"
        "runs.script(__doc__, C, main)\n")

    def run(*arguments):
        done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True,
                              text=True, cwd=tmp_path)
        return done.returncode, done.stdout, done.stderr

    assert run("a.tif", "n=2") == (0, "hello 2 ['a.tif']\n", "")
    code, out, err = run("m=2")
    assert code == 1 and out == "" and err == "error: m=2: unknown key 'm'; known keys: n\n"
    assert run("n=3")[2] == "error: no/such/file: No such file or directory\n"
    assert run("--fast")[2].startswith(
        "error: unknown option --fast; options are written key=value"
    )
    code, out, err = run("--help")
    assert code == 0 and "Says hello." in out and "n=1" in out and "times" in out


def test_help_into_a_closed_pipe_is_no_traceback():
    """python infer.py --help | head"""
    script = subprocess.Popen([sys.executable, ROOT / "infer.py", "--help"], stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE)
    script.stdout.close()
    assert script.stderr.read() == b"" and script.wait() == 0


@dataclass(frozen=True)
class Few:
    """What runs.Run asks of a configuration."""
    output_base_dir: str
    experiment: str = "few"
    checkpoint_name: str = "few"


@dataclass(frozen=True)
class Saved(Few):
    keep: int = 2
    log_every: int = 1


def test_a_signal_too_late_for_one_run_reaches_who_listens_to_all(tmp_path):
    """A run hears signals until it is closed; then those hear them who did before, of one that came
    meanwhile too."""
    before = signal.getsignal(signal.SIGTERM)
    with runs.stop_signals() as heard:
        for times in (1, 2):
            run = runs.Run(Few(str(tmp_path)))
            signal.raise_signal(signal.SIGTERM)
            assert run.stopping and len(heard) == times - 1
            run.close()
            assert heard == [signal.SIGTERM] * times
        signal.raise_signal(signal.SIGTERM)
        assert len(heard) == 3
        runs.Run(Few(str(tmp_path))).close()
        assert len(heard) == 3  # none came: none is told
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("place", ["folder", "file/x.pt"])
def test_a_place_for_weights_that_cannot_be_is_refused_before_the_training(tmp_path, place):
    @dataclass(frozen=True)
    class Exported(Few):
        output_base_dir: str = str(tmp_path / "out")
        export_path: str | None = None
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot be written"):
        runs.Run(Exported(export_path=str(tmp_path / place)))
    assert not (tmp_path / "out").exists()
    (weights := tmp_path / "x.pt").write_text("of before")
    runs.Run(Exported(export_path=str(weights))).close()
    assert weights.read_text() == "of before"


def test_a_second_process_in_the_folder_of_a_run_is_refused(tmp_path):
    """Two would take turns with its checkpoints."""
    run = runs.Run(Few(str(tmp_path)))
    with pytest.raises(ValueError, match="few: another process trains in this folder"):
        runs.Run(Few(str(tmp_path)))
    runs.Run(Few(str(tmp_path)), rank=1, world=2).close()                   # of the same group
    run.close()
    runs.Run(Few(str(tmp_path))).close()


def test_another_name_for_checkpoints_is_another_configuration(tmp_path):
    """Else it would write over the weights of a run that is done."""
    run = runs.Run(Saved(str(tmp_path)))
    run.save(1, x=1)
    run.close()
    with pytest.raises(ValueError, match="another configuration .checkpoint_name: few -> more"):
        runs.Run(Saved(str(tmp_path), checkpoint_name="more"))


def test_a_run_that_was_killed_before_its_first_checkpoint_leaves_no_log(tmp_path):
    for _ in range(2):
        run = runs.Run(Saved(str(tmp_path)))
        assert run.history() == []
        run.log(1, loss=2.0)
        run.close()
    run.save(1, x=1)
    assert [line["step"] for line in runs.Run(Saved(str(tmp_path))).history()] == [1]


def test_a_full_disk_is_said_as_such(tmp_path):
    """PyTorch says something else."""
    import resource
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10000, before[1]))
        with pytest.raises(OSError, match="File too large: .*x.pt"):
            runs.save_torch({"x": torch.zeros(100000)}, tmp_path / "x.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["null", "5", "[1]", "{"])
def test_a_record_without_keys_is_damaged(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match="x.json: damaged, .*; remove it"):
        runs.read_record(tmp_path / "x.json", "remove it")


@pytest.mark.skipif(sys.platform != "linux", reason="of Linux' C library alone")
def test_memory_that_a_pass_of_a_network_frees_is_there_for_the_next():
    """24 MB are 6,000 pages; without runs every addition asks for them anew."""
    code = """
import resource, sys, torch
if sys.argv[1] == "kept":
    import runs
x = torch.ones(6_000_000)
def faults(n):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n):
        x + x
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(10)
print(faults(20))
"""
    kept, given_back = (int(subprocess.run([sys.executable, "-c", code, how], cwd=ROOT, check=True,
                                           capture_output=True, text=True).stdout)
                        for how in ("kept", "given back"))
    if given_back > 50_000:                                    # glibc, as it is by default
        assert kept < given_back / 2


def test_a_signal_before_the_run_and_one_while_work_is_shared_stop_it(tmp_path):
    with runs.stop_signals() as heard:
        run = runs.Run(Few(str(tmp_path)))
        assert run.each(lambda x: 2 * x, [1, 2, 3]) == [2, 4, 6]
        done = []
        with pytest.raises(runs.Stopped):
            run.each(lambda x: done.append(x) or (x == 2 and signal.raise_signal(signal.SIGUSR1)),
                     [1, 2, 3])
        assert done == [1, 2] and run.exit_code() == runs.REQUEUE
        run.close()
        assert heard == [signal.SIGUSR1]
        late = runs.Run(Few(str(tmp_path)))
        assert late.stopping and late.should_stop(1) and late.exit_code() == runs.REQUEUE
        late.close()
        assert heard == [signal.SIGUSR1]                                     # it was told once
    fresh = runs.Run(Few(str(tmp_path)))
    assert not fresh.stopping
    fresh.close()


def test_memory_that_a_gpu_lacks_is_one_line_and_other_errors_are_not_hidden(capsys):
    class OutOfMemoryError(RuntimeError):
        pass

    def fail(error):
        raise error

    assert (
        runs.guarded(lambda: fail(OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")))
        == 1
    )
    assert (
        capsys.readouterr().err
        == "error: out of GPU memory; give a smaller batch= or smaller crops or tiles\n"
    )
    with pytest.raises(RuntimeError):
        runs.guarded(lambda: fail(RuntimeError("a bug")))


def test_what_is_given_to_others_names_no_place_on_this_machine():
    @dataclass(frozen=True)
    class Places:
        root: str = "/home/me/data"
        inside: tuple[str, ...] = ("/scratch/a.pt", "sets/train")
    assert runs.to_yaml(Places(), shared=True) == "root: data\ninside:\n- a.pt\n- sets/train\n"
    assert "/home/me/data" in runs.to_yaml(Places())


def test_a_process_of_a_group_leaves_with_its_code_and_what_was_to_be_done(tmp_path):
    """Not by way of the interpreter's teardown: a thread that would hold it up is left behind."""
    script = tmp_path / "leave.py"
    script.write_text(f"""import atexit, sys, threading, time
sys.path.insert(0, {str(ROOT)!r})
import torch, runs
atexit.register(print, "told")
torch.distributed.init_process_group("gloo", init_method="file://{tmp_path}/meet",
                                     rank=0, world_size=1)
threading.Thread(target=time.sleep, args=(60,)).start()
runs.leave(runs.REQUEUE)
""")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=40)
    assert (done.returncode, done.stdout) == (runs.REQUEUE, "told\n"), done.stderr


# ------------------------------------------------------------------------------------------ threads

def test_cores_are_those_that_this_process_may_use(tmp_path, monkeypatch):
    """The least of affinity, Slurm's word and the quotas of the process's control group and of
    those above it."""
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    monkeypatch.setattr(runs.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    process, root = tmp_path / "cgroup", tmp_path / "fs"
    (root / "job" / "step").mkdir(parents=True)
    (root / "cpu" / "job").mkdir(parents=True)
    process.write_text("0::/job/step\n")
    assert runs.cores(root, process) == runs.cores(root, tmp_path / "none") == 8
    (root / "job" / "step" / "cpu.max").write_text("max 100000\n")
    assert runs.cores(root, process) == 8
    (root / "job" / "cpu.max").write_text("250000 100000\n")
    assert runs.cores(root, process) == 3                                    # two and a half
    process.write_text("5:memory:/job\n4:cpu,cpuacct:/job\n")
    for quota, expected in ((-1, 8), (50000, 1), (600000, 6)):
        (root / "cpu" / "job" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (root / "cpu" / "job" / "cpu.cfs_period_us").write_text("100000\n")
        assert runs.cores(root, process) == expected
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
    assert runs.cores(root, process) == 2


def test_free_memory_is_what_this_process_may_still_take(tmp_path):
    """The least of what the machine has and of what its control groups leave, of which a cache of
    files can be had back; unknown is without end."""
    process, root, proc = tmp_path / "cgroup", tmp_path / "fs", tmp_path / "proc"
    free = functools.partial(runs.free_memory, root, process, proc)
    assert free() == math.inf
    proc.mkdir()
    (proc / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:   500 kB\n")
    assert free() == 500 * 1024
    process.write_text("0::/job\n")
    (root / "job").mkdir(parents=True)
    for name, text in (("max", "max\n"), ("current", "100000\n"),
                       ("stat", "inactive_file 30000\n")):
        (root / "job" / f"memory.{name}").write_text(text)
    assert free() == 500 * 1024
    (root / "job/memory.max").write_text("300000\n")
    assert free() == 300000 - 100000 + 30000
    process.write_text("3:memory:/job\n")
    old = root / "memory/job"
    old.mkdir(parents=True)
    for name, text in (("limit_in_bytes", "90000\n"), ("usage_in_bytes", "100000\n"),
                       ("stat", "total_inactive_file 0\n")):
        (old / f"memory.{name}").write_text(text)
    assert free() == 0


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_scripts_take_the_threads_of_their_cores():
    core = min(os.sched_getaffinity(0))
    code = (f"import os; os.sched_setaffinity(0, {{{core}}}); import runs, torch; "
            "print(torch.get_num_threads(), os.environ['GOMP_SPINCOUNT'])")
    bare = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT")}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=bare, capture_output=True,
                          text=True)
    assert done.stdout.split() == ["1", "1000"], done.stderr


# ------------------------------------------------------------------- imports, bounds, files, tables

def test_other_threads_import_as_ever_while_one_is_lazy():
    """A page's network imports parts of packages while a request loads its modules."""
    found = []

    def other():
        import wsgiref.simple_server  # a part: in lazy() it is refused
        found.append(type(wsgiref.simple_server))

    with runs.lazy():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert found == [types.ModuleType]


def test_lazy_modules_run_at_their_first_use(tmp_path):
    (tmp_path / "slow.py").write_text("print('ran')\nVALUE = 3\n")
    code = ("import runs\nwith runs.lazy():\n    import slow\nprint('first', "
            "runs.is_loaded('slow'))\n"
            "print(slow.VALUE, runs.is_loaded('slow'))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert done.stdout.split() == ["first", "False", "ran", "3", "True"]
    with pytest.raises(ImportError, match="whole packages"), runs.lazy():
        import xml.never_there  # noqa: F401


@dataclass(frozen=True)
class Bounded:
    steps: runs.Count = 3                   # of a run
    share: runs.Share | None = None
    lr: runs.Positive = 0.1


@pytest.mark.smoke
@pytest.mark.parametrize("given, expected", [
    ("steps=0", "steps=0: expected a whole number, 1 or more"),
    ("steps=x", "expected a whole number, 1 or more"),
    ("share=1.5", "expected a number, from 0 to 1 or null"),
    ("lr=0", "lr=0: expected a number, above 0"),
    ("lr=nan", "above 0"), ("lr=inf", "above 0")])
def test_bounds_stand_in_the_type(given, expected):
    with pytest.raises(ValueError, match=expected):
        runs.load_config(Bounded, overrides=[given])
    assert runs.load_config(Bounded, overrides=["share=1", "steps=1"]) == Bounded(1, 1.0)
    assert "of a run (1 or more)" in runs.config_help(
        Bounded
    ) and "(from 0 to 1)" in runs.config_help(Bounded)


@pytest.mark.smoke
@pytest.mark.parametrize("suffix", ["tsv", "csv"])
def test_tables_come_back(tmp_path, suffix):
    path = tmp_path / "made" / f"table.{suffix}"
    runs.write_table(path, [{"name": "a, b", "x": 1 / 3},
                            {"name": "c", "y": None, "x": float("nan")}], first=["y"])
    assert runs.read_table(path, ["name"]) == [{"y": "", "name": "a, b", "x": "0.3333333333"},
                                               {"y": "", "name": "c", "x": ""}]
    with pytest.raises(ValueError, match="no columns 'nam', expected one; did you mean 'name'"):
        runs.read_table(path, ["nam"])


@pytest.mark.smoke
def test_what_fails_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "a.txt"
    runs.write_text(path, "before")
    with pytest.raises(RuntimeError), runs.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="no such folder"):
        runs.write_text(tmp_path / "none" / "a.txt", "")
    for error in (OSError(27, "File too large"), OSError("131072 requested and 14088 written")):
        with pytest.raises(OSError) as said, runs.replacing(path):
            raise error
        assert said.value.filename == str(path) and said.value.strerror
    with pytest.raises(OSError, match="^s3://b: lost$"), runs.replacing(path):  # of another
        raise OSError("s3://b: lost")


@pytest.mark.smoke
def test_two_threads_may_replace_one_file(tmp_path):
    """As the page does when it saves what another part of it has just written."""
    path = tmp_path / "a.txt"
    with runs.replacing(path) as temporary:
        temporary.write_text("later")
        other = threading.Thread(target=runs.write_text, args=(path, "earlier"))
        other.start()
        other.join()
        assert path.read_text() == "earlier"
    assert path.read_text() == "later" and list(tmp_path.iterdir()) == [path]


def test_lazy_modules_are_left_alone_by_who_looks_at_all(tmp_path):
    """As inspect does while torch is loading: what it looks at must not run another half of the
    program."""
    (tmp_path / "slow.py").write_text("print('ran')\nVALUE = 3\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("print('package')\n")
    (tmp_path / "package" / "part.py").write_text("VALUE = 4\n")
    code = ("import inspect, sys, runs\nwith runs.lazy():\n    import slow, package\n"
            "inspect.getmodule(inspect.currentframe())\nprint('quiet')\nimport "
            "package.part\nprint(package.part.VALUE)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert done.stdout.split() == ["quiet", "package", "4"]


def test_what_a_lazy_module_is_given_stays(tmp_path):
    (tmp_path / "slow.py").write_text("VALUE = 3\n")
    code = "import runs\nwith runs.lazy():\n    import slow\nslow.VALUE = 4\nprint(slow.VALUE)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert done.stdout.split() == ["4"]


@pytest.mark.smoke
def test_devices_are_picked_by_what_is_there(monkeypatch):
    """Apple's mps beside cuda and cpu; it has no bfloat16 here, so that autocast stays off."""
    import torch

    import model
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert runs.pick_device("auto") == "cpu"
    for missing in ("cuda", "mps"):
        with pytest.raises(ValueError, match=f"device={missing}: PyTorch finds no {missing.upper()}"
                                             " device here"):
            runs.pick_device(missing)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert runs.pick_device("auto") == runs.pick_device("mps") == "mps"
    assert runs.pick_device("cpu") == "cpu" and not model.has_bf16("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert runs.pick_device("auto") == "cuda"
    with torch.autocast("mps", torch.bfloat16, enabled=False):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32


def test_nan_is_null_in_json_at_any_depth():
    given = {"a": [1.5, float("nan"), {"b": (float("inf"), "text", None, 3)}]}
    assert runs.without_nan(given) == {"a": [1.5, None, {"b": [None, "text", None, 3]}]}

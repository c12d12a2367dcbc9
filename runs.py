"""Configurations (frozen dataclass <-> YAML <-> `key=value`), scripts, run folders.

A script declares one frozen dataclass, whose comments `--help` prints, and ends with

    if __name__ == "__main__":
        runs.script(__doc__, Config, main)        # python SCRIPT.py [CONFIG.yaml] [key=value ...]

A user's mistake raises ValueError or OSError and ends as one line `error: ...`, exit code 1
(DINOCELL_DEBUG=1 shows the traceback).

A training script opens a Run and asks it for everything that must survive the process:

    run = runs.Run(config)                       runs/<experiment>/: config.yaml, log.jsonl, logs/,
                                                 images/, checkpoints/
    state = run.resume()                         the newest whole checkpoint, or None
    run.log(step, loss=..., lr=...)              one line of JSON, and the same on the screen
    run.save(step, model=..., optimiser=...)     atomic, the last few kept; is_best=True besides
    if run.should_stop(step): ...                SIGTERM, SIGUSR1 (Slurm's warning) or Ctrl-C came:
                                                 save and exit
"""
from __future__ import annotations

import atexit
import contextlib
import csv
import ctypes
import dataclasses
import difflib
import errno
import hashlib
import importlib.abc
import importlib.machinery
import inspect
import io
import json
import math
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
import types
import typing
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import yaml

Config = TypeVar("Config")


# ------------------------------------------------------------------------------------------ threads

def cores(cgroups: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup")) -> int:
    """Cores of this process: the least of its affinity, the quota of its control groups
    (containers) and what Slurm gave the task."""
    counts = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
              else os.cpu_count() or 1]
    slurm = os.environ.get("SLURM_CPUS_PER_TASK", "")
    if slurm.isdigit():
        counts.append(int(slurm))
    with contextlib.suppress(OSError, ValueError):  # no Linux, or an unknown format
        for group in _control_groups("cpu", cgroups, process):
            quota, period = "max", "100000"
            if (group / "cpu.max").is_file():  # version 2
                quota, period = (group / "cpu.max").read_text().split()
            elif (group / "cpu.cfs_quota_us").is_file():  # version 1, where -1 means none
                quota, period = ((group / f"cpu.cfs_{name}_us").read_text()
                                 for name in ("quota", "period"))
            if quota != "max" and int(quota) > 0:
                counts.append(math.ceil(int(quota) / int(period)))
    return max(1, min(counts))


def free_memory(cgroups: Path = Path("/sys/fs/cgroup"), process: Path = Path("/proc/self/cgroup"),
                system: Path = Path("/proc")) -> float:
    """Bytes that this process can still take: the least of what the machine has, what its control
    groups allow and its own limit; infinite where none of them is known."""
    free = [math.inf]
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found = re.search(r"MemAvailable:\s+(\d+) kB", (system / "meminfo").read_text())
        free.append(1024 * int(found[1]) if found else math.inf)
    with contextlib.suppress(OSError, ValueError):
        for group in _control_groups("memory", cgroups, process):
            for most, used, cache in (
                    ("memory.max", "memory.current", "inactive_file"),
                    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")):
                if (group / most).is_file() and (limit := (group / most).read_text()) != "max\n":
                    kept = re.search(rf"^{cache} (\d+)", (group / "memory.stat").read_text(), re.M)
                    free.append(int(limit) - int((group / used).read_text())
                                + int(kept[1] if kept else 0))
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource  # not on Windows
        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        if limit != resource.RLIM_INFINITY:
            pages = int((system / "self" / "statm").read_text().split()[0])
            free.append(limit - pages * resource.getpagesize())
    return max(0, min(free))


def _control_groups(controller: str, cgroups: Path, process: Path) -> Iterator[Path]:
    """Folders of this process's control groups that a controller has, and of those above."""
    for line in process.read_text().splitlines():
        _, controllers, place = line.split(":", 2)  # version 2 names no controllers
        if controllers and controller not in controllers.split(","):
            continue
        folder = cgroups / (controller if controllers else "") / place.strip("/")
        yield from (group for group in (folder, *folder.parents)
                    if group == cgroups or cgroups in group.parents)


# PyTorch reads these once, when it is loaded. Threads that wait spin for milliseconds by default
# and keep the core from those that they wait for: five times slower beside other processes.
for _key, _value in (("OMP_NUM_THREADS", cores()), ("GOMP_SPINCOUNT", 1000), ("KMP_BLOCKTIME", 1)):
    os.environ.setdefault(_key, str(_value))


def keep_freed_memory() -> None:
    """Have the C library keep what one pass of a network frees for the next: back from the kernel
    it comes page by page, each cleared, which takes a tenth of the time on a CPU."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # elsewhere than on Linux
        mallopt = ctypes.CDLL(None).mallopt
        # M_MMAP_THRESHOLD: larger pieces still go back at once; older libraries take 32 MB at most
        if mallopt(-3, 64 << 20) or mallopt(-3, 32 << 20):
            mallopt(-1, 512 << 20)  # M_TRIM_THRESHOLD: of free memory at the end, what is kept


keep_freed_memory()


# ------------------------------------------------------------------------------------------ imports

class _LazyModule(types.ModuleType):
    """A module that runs at its first use; __file__ and the like, which inspect asks of all
    modules, are none."""
    lock = threading.RLock()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in ("__version__", "__path__"):
            raise AttributeError(name)
        self._run()
        return types.ModuleType.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if not name.startswith("__"):               # or running would set it back
            self._run()
        types.ModuleType.__setattr__(self, name, value)

    def _run(self) -> None:
        with self.lock:
            spec: Any = self.__spec__
            if isinstance(spec.loader, _LazyLoader):
                spec.loader = self.__loader__ = spec.loader.loader
                if spec.submodule_search_locations is not None:
                    self.__path__ = spec.submodule_search_locations
                spec.loader.exec_module(self)
                self.__class__ = types.ModuleType  # type: ignore[assignment]  # now a usual one


class _LazyLoader(importlib.abc.Loader):
    def __init__(self, loader):
        self.loader = loader

    def exec_module(self, module) -> None:
        module.__class__ = _LazyModule
        vars(module).pop("__path__", None)  # `import package.part` asks for it: the package runs


class _LazyFinder:
    """Finds the modules of a `with lazy():` block, which other threads import as ever."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()

    def find_spec(self, name: str, path=None, target=None):
        if threading.get_ident() != self.thread:
            return None
        if "." in name:
            raise ImportError(f"import {name}: in lazy() only whole packages, for this would run "
                              f"{name.partition('.')[0]}")
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _LazyLoader(spec.loader)
        return spec


@contextlib.contextmanager
def lazy() -> Iterator[None]:
    """Let modules imported in this block run at their first use, so that --help is quick.

    Whole packages only: `from torch import Tensor` and `import torch.nn` would run torch at once.
    """
    finder: Any = _LazyFinder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def is_loaded(name: str) -> bool:
    """Whether a module has run."""
    return type(sys.modules.get(name)) is types.ModuleType


# ------------------------------------------------------------------------------------------- bounds

class Bound(NamedTuple):
    """Limits of a value, for Annotated; errors and --help print the text."""
    text: str
    holds: Callable[[Any], bool]


def at_least(low: float) -> Bound:
    return Bound(f"{low:g} or more", lambda value: low <= value < math.inf)


def above(low: float) -> Bound:
    return Bound(f"above {low:g}", lambda value: low < value < math.inf)


def within(low: float, high: float) -> Bound:
    return Bound(f"from {low:g} to {high:g}", lambda value: low <= value <= high)


Name = Annotated[str, Bound("the name of a folder", lambda name: bool(name) and not
                            {"", ".", ".."} & set(re.split(r"[/\\]", name)))]
Count = Annotated[int, at_least(1)]
Whole = Annotated[int, at_least(0)]
Side = Annotated[int, within(1, 4096)]                # px, of tiles and crops
Area = Annotated[int, within(0, 1e9)]                 # px
Reach = Annotated[float, within(0, 1e4)]              # px
Batch = Annotated[int, within(1, 1 << 16)]
Width = Annotated[int, within(1, 1 << 14)]            # of a network: numbers a token
Depth = Annotated[int, within(1, 1000)]               # of a network: blocks, heads
Patch = Annotated[int, within(1, 64)]                 # px
Positive = Annotated[float, above(0)]
NotNegative = Annotated[float, at_least(0)]
Share = Annotated[float, within(0, 1)]           # or a probability
Part = Annotated[float, Bound("from 0 to below 1", lambda value: 0 <= value < 1)]   # never all
Distance = Part                                  # to the cell's edge, as predicted


# ------------------------------------------------------------------------------------------ reading

NODES = 100_000                         # values of a configuration


def load_config(cls: type[Config], path: str | Path | None = None,
                overrides: Sequence[str] = ()) -> Config:
    """A configuration from a YAML file or defaults, then `key=value`; `a.b=1` is b of section a."""
    values: dict[str, Any] = {}
    origin = "command line"
    if path is not None:
        origin = str(path)
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such configuration; configs/ has some")
        values = read_yaml(Path(path))
    # a section before its keys, whichever was typed first
    for text in sorted(overrides, key=lambda text: text.partition("=")[0].count(".")):
        key, _, value = text.partition("=")
        *sections, last = key.split(".")
        inner = values
        for section in sections:
            below = inner.get(section, {})
            hint = typing.get_type_hints(cls).get(section) if inner is values else None
            if isinstance(below, _Given) and isinstance(below.value, dict):    # data={b: c}
                below = below.value
            if isinstance(below, _Given) and dataclasses.is_dataclass(hint):   # data=a data.b=c
                below = {dataclasses.fields(hint)[0].name: below}
            if not isinstance(below, dict):
                raise ValueError(f"{text}: '{section}' is a value in {origin}, no section")
            inner[section] = inner = dict(below)  # a section that YAML names twice (&, *) is two
        inner[last] = _Given(_typed_value(value), text)
    return from_dict(cls, values, origin)


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys of a YAML file."""
    try:
        values = parse_yaml(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" in line {where.line + 1}" if where else ""
        reason = getattr(error, "problem", None) or (
            "nested too deep" if isinstance(error, RecursionError) else error)
        raise ValueError(f"{path}: not valid YAML{line}: {reason}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: got a {type(values).__name__}, expected lines `key: value`")
    return values


def parse_yaml(text: str) -> Any:
    """A value of YAML; yaml.YAMLError for a key that stands twice, and for aliases (&, *) that hold
    themselves or grow beyond NODES values."""
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node is None:
            return None
        _count_yaml_nodes(node, (), {})
        return yaml.SafeLoader("").construct_document(node)
    except ValueError as error:  # 2024-13-45 as a date, say
        raise yaml.MarkedYAMLError(problem=str(error)) from None


def _count_yaml_nodes(node: yaml.Node, above: tuple[yaml.Node, ...], known: dict[int, int]) -> int:
    """Values below a node, each as often as an alias names it."""
    if node in above:
        raise yaml.MarkedYAMLError(problem="an alias (*) that holds itself",
                                   problem_mark=node.start_mark)
    if id(node) not in known:
        below = node.value if isinstance(node.value, list) else []
        if isinstance(node, yaml.MappingNode):
            keys = [key.value for key, _ in below if isinstance(key, yaml.ScalarNode)]
            if twice := [key for key in keys if keys.count(key) > 1 and key != "<<"]:
                raise yaml.MarkedYAMLError(problem=f"the key '{twice[0]}' stands twice",
                                           problem_mark=node.start_mark)
            below = [part for pair in below for part in pair]
        known[id(node)] = 1 + sum(_count_yaml_nodes(part, (*above, node), known) for part in below)
        if known[id(node)] > NODES:
            raise yaml.MarkedYAMLError(problem=f"aliases (*) that grow beyond {NODES} values",
                                       problem_mark=node.start_mark)
    return known[id(node)]


def _typed_value(text: str) -> Any:
    """What is typed behind key=, as YAML has it; 'a: b', '@405' and the like are meant as text."""
    try:
        return parse_yaml(text) if text else ""
    except yaml.YAMLError:
        return text


class _Given:
    """A value of key=value: errors name the argument, fields of text take it as it was typed."""

    def __init__(self, value: Any, text: str):
        self.value, self.text = value, text


def from_dict(cls: type[Config], values: dict[str, Any], origin: str, prefix: str = "") -> Config:
    """A dataclass from a dictionary; an unknown or missing key or a wrong type is an error."""
    hints = typing.get_type_hints(cls, include_extras=True)
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # a dataclass
    result = {}
    for key, value in values.items():
        source = value.text if isinstance(value, _Given) else origin
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.5)
            hint = f", did you mean '{near[0]}'?" if near else f"; known keys: {', '.join(known)}"
            raise ValueError(f"{source}: unknown key '{prefix}{key}'{hint}")
        result[key] = _config_value(value, hints[key], f"{prefix}{key}", source)
    for name, f in known.items():
        if name not in result and f.default is f.default_factory is dataclasses.MISSING:
            raise ValueError(f"{origin}: key '{prefix}{name}' is missing, expected "
                             f"{_config_type_name(hints[name])}")
    try:
        return cls(**result)
    except ValueError as error:  # the dataclass's own check of combinations
        raise ValueError(f"{origin}: {error}") from None


UNIONS = (typing.Union, types.UnionType)          # of Annotated types, and of others


class _Misfit(Exception):
    """The value does not fit its field."""


def _config_value(value: Any, hint: Any, key: str, origin: str) -> Any:
    """A value of YAML as the field's type, or an error that names both."""
    typed = value.text.partition("=")[2] if isinstance(value, _Given) else None
    value = value.value if isinstance(value, _Given) else value
    inner = typing.get_args(hint) if typing.get_origin(hint) in UNIONS else (hint,)
    section: Any = next(filter(dataclasses.is_dataclass, inner), None)
    if section and not (value is None and type(None) in inner):
        if isinstance(value, (str, list)):  # `data: folder` for `data: {sets: folder}`, say
            value = {dataclasses.fields(section)[0].name: value}
        if isinstance(value, dict):
            return from_dict(section, value, origin, key + ".")
        raise ValueError(f"{origin}: {key} is {value!r}, expected a section with keys")
    try:
        return _config_fit(value, typed, hint, key, origin)
    except _Misfit:
        raise ValueError(f"{origin}: " + f"{key} is {value!r}, " * (typed is None)
                         + f"expected {_config_type_name(hint)}") from None


def _config_fit(value: Any, typed: str | None, hint: Any, key: str, origin: str) -> Any:
    """The value as the type; typed : the text behind key=, if there is one."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind is Annotated:
        number = _config_fit(value, typed, inner[0], key, origin)
        if all(bound.holds(number) for bound in inner[1:]):
            return number
    elif kind in UNIONS:
        if value is None and type(None) in inner:
            return None
        for choice in (h for h in inner if h is not type(None)):
            with contextlib.suppress(ValueError, _Misfit):
                return _config_fit(value, typed, choice, key, origin)
    elif kind is tuple and value is not None:
        if isinstance(value, str) and typed is not None:
            value = [_typed_value(part) if part else None for part in value.split(",")]
        parts = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_config_value(part, inner[0], key, origin) for part in parts)
    elif kind is typing.Literal:
        if isinstance(value, bool):  # YAML reads no, off, on as truth values
            value = typed or ("on" if value else "off")
        if value in inner:
            return value
    else:
        return _config_plain(value, typed, kind or hint)
    raise _Misfit


def _config_plain(value: Any, typed: str | None, kind: Any) -> Any:
    """The value as int, float, str, bool or dict."""
    if kind is int:
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE]\+?\d+", value):
            value = float(value)  # 1e4 is text to PyYAML
        if type(value) in (int, float) and abs(value) < 1e18 and value == int(value):
            return int(value)
    elif kind is float and not isinstance(value, bool):  # no is not 0
        with contextlib.suppress(TypeError, ValueError):
            return float(value)
    elif kind is str and (typed is not None or type(value) in (str, int, float)):
        return str(value) if typed is None else typed
    elif kind is bool and isinstance(value, bool):
        return value
    elif kind is dict and isinstance(value, dict):  # a free section of any depth
        return {k: _config_plain(v, None, dict) if isinstance(v, dict)
                else v.value if isinstance(v, _Given) else v for k, v in value.items()}
    raise _Misfit


def _config_type_name(hint: Any) -> str:
    """A type in plain words."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind is Annotated:
        return ", ".join([_config_type_name(inner[0]), *(bound.text for bound in inner[1:])])
    if kind in UNIONS:
        return " or ".join("null" if h is type(None) else _config_type_name(h) for h in inner)
    if kind is typing.Literal:
        return " or ".join(map(str, inner))
    if kind is tuple:
        return f"a list of {_config_type_name(inner[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text",
            dict: "a section"}.get(hint, getattr(hint, "__name__", str(hint)))


# ------------------------------------------------------------------------------------------ writing

def to_yaml(config: Any, shared: bool = False) -> str:
    """A configuration as YAML, which load_config() reads back.

    shared : for others, inside weights: of paths on this machine only the last part.
    """
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, str) and shared and Path(value).is_absolute():
            return Path(value).name
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value
    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def key_comments(cls: type) -> dict[str, str]:
    """Comments of the keys, behind them or above them, of a class and its bases."""
    comments: dict[str, str] = {}
    above: list[str] = []
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        for line in inspect.getsource(base).splitlines():
            key = re.match(r"    (\w+):[^#]*(?:# ?(.*))?$", line)
            if key:
                comments[key[1]] = " ".join([*above, *filter(None, [key[2]])])
            above = [*above, line.strip("# ")] if re.match(r"    #", line) else []
    return comments


def config_help(cls: type, prefix: str = "", given: Any = None) -> str:
    """The keys of a configuration with defaults and comments from its source, for --help."""
    comments, lines = key_comments(cls), []
    hints: dict[str, Any] = typing.get_type_hints(cls, include_extras=True)
    for f in dataclasses.fields(cls):
        hint, default = hints[f.name], f.default
        nested = dataclasses.is_dataclass(hint)
        if given is not None:
            default = getattr(given, f.name)
        elif nested and f.default_factory is hint:  # alone it may be incomplete
            default = None
        elif f.default_factory is not dataclasses.MISSING:
            default = f.default_factory()
        if nested:
            lines.append(config_help(hint, f"{prefix}{f.name}.", default))
            continue
        text = ("..." if default is dataclasses.MISSING else "null" if default is None
                else str(default).lower() if isinstance(default, bool) else default)
        bounds = {bound.text for part in (hint, *typing.get_args(hint))
                  if typing.get_origin(part) is Annotated for bound in typing.get_args(part)[1:]}
        lines.append(f"  {prefix}{f.name}={text}".ljust(30) + " " + comments.get(f.name, "")
                     + "".join(f" ({b})" for b in bounds))
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------ scripts

def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(files and folders, key=value overrides); a file that exists may have any name."""
    overrides = [argument for argument in arguments
                 if re.match(r"[A-Za-z_][\w.]*=", argument) and not os.path.exists(argument)]
    return [argument for argument in arguments if argument not in overrides], overrides


def script(doc: str, cls: type, main: Callable[..., int | None],
           arguments: list[str] | None = None) -> None:
    """Run main(config, files) as a command: --help, key=value, errors of one line, exit code.

    A first file .yaml or .yml is the configuration; the others go to main. A main with a parameter
    `check` takes --check: it prints a plan and stops.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no UTF-8

    def run() -> int:
        if {"--help", "-h"} & set(arguments):
            keys = config_help(cls)
            print(f"{doc.strip()}\n\nKeys, as key=value or in YAML:\n{keys}", flush=True)
            return 0
        files, overrides = split_arguments(arguments)
        flags = {}
        if "--check" in files and "check" in inspect.signature(main).parameters:
            flags, files = {"check": True}, [a for a in files if a != "--check"]
        if unknown := [a for a in files if a.startswith("--")]:
            raise ValueError(f"unknown option {unknown[0]}; options are written key=value, --help "
                             "lists them")
        given = files.pop(0) if files and files[0].endswith((".yaml", ".yml")) else None
        if late := [a for a in files if a.endswith((".yaml", ".yml"))]:
            raise ValueError(f"{late[0]}: a configuration is the first argument, and the only one")
        return main(load_config(cls, given, overrides), files, **flags) or 0

    leave(guarded(run))


def leave(code: int) -> None:
    """End this process; in a group without the interpreter's teardown, in which gloo's threads may
    abort a run that is done (PyTorch's issue 190489)."""
    if in_group():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


class Stopped(Exception):
    """A signal came while processes shared work, or while fields were waited for."""


GIVEN_BACK = {signal.SIGTERM, getattr(signal, "SIGUSR1", signal.SIGTERM)}  # no USR1 on Windows


class Heard(list):
    """A handler that collects signals."""

    def __call__(self, number: int, frame) -> None:
        self.append(number)


@contextlib.contextmanager
def stop_signals():
    """A list that fills when the machine is to be given back, with SIGTERM or Slurm's SIGUSR1."""
    caught = Heard()
    before = {each: signal.signal(each, caught) for each in GIVEN_BACK}
    try:
        yield caught
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def shard_of(shard: str) -> tuple[int, int]:
    """'3/16' -> 3, 16"""
    part = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not part or not 1 <= int(part[1]) <= int(part[2]):
        raise ValueError(f"shard={shard}: expected i/n with i from 1 to n, such as 3/16")
    return int(part[1]), int(part[2])


def guarded(run: Callable[[], int]) -> int:
    """Exit code of run(); a user's mistake becomes one line on stderr."""
    try:
        return run()
    except KeyboardInterrupt:
        print("\nstopped; finished parts are kept, the same command goes on", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has seen enough: python x.py | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:
        if os.environ.get("DINOCELL_DEBUG"):
            raise
        print("error: " + " ".join(error_sentence(error).split()), file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or os.environ.get("DINOCELL_DEBUG"):
            raise
        print(f"error: out of {'GPU ' * ('OutOfMemory' in type(error).__name__)}memory; give a "
              "smaller batch= or smaller crops or tiles", file=sys.stderr)
        return 1


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; on the CPU PyTorch says it in words alone."""
    return (isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
            or "can't allocate memory" in str(error))


# of one job of several: it is said, and the next one is done
FAILURES = (ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)


def error_sentence(error: Exception) -> str:
    """OSError from the system as `file: reason`; ours and ValueError as they are."""
    if isinstance(error, MemoryError):
        return "out of memory"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


# --------------------------------------------------------------------------------------- run folder

WandbMode = typing.Literal["off", "on", "online", "offline"]         # on is online


@dataclasses.dataclass(frozen=True)
class WandbOptions:
    project: str = "dinocell"
    entity: str | None = None               # team or user; null: the account's own
    name: str | None = None                 # of the run there; null: the experiment
    every: Whole = 0                        # steps between losses and gradients; 0: as logged
    attention: bool = True                  # pictures of attention
    pca: bool = True                        # pictures of the features' main components
    gradient_norms: bool = False            # of each block
    gradient_histogram: bool = False        # of all gradients
    system: bool = True                     # load and memory of the machine


REQUEUE = 85  # exit code: saved, not finished; slurm/train.sh queues the job again
# Keys that may change when a run goes on: they change no result.
FREE = ("output_base_dir", "data.root", "device", "log_every", "save_every", "keep", "wandb",
        "compile", "data.signed", "data.cache", "data.cache_gb", "data.threads",
        "data.memory_gb",
        *(f"wandb_options.{option.name}" for option in dataclasses.fields(WandbOptions)))


class Run:
    """The folder of one experiment; of a group of processes only the first writes into it."""

    def __init__(self, config: Any, rank: int = 0, world: int = 1, device: str = "cpu"):
        self.config, self.rank, self.world, self.device = config, rank, world, device
        self.signal: int | None = None
        self.folder = Path(config.output_base_dir) / "runs" / config.experiment
        self.checkpoints = self.folder / "checkpoints" / config.checkpoint_name
        self.whole: list[Path] = []  # checkpoints that were looked through
        self.screen: Path | None = None
        self.wandb, self.sent = None, dict[str, int]()  # the last step at which each was sent
        self.began = time.perf_counter()
        self._check_same_run()
        if hasattr(config, "export_path"):                     # before the training, not after it
            check_file_can_be_written(export_path(config))
        self.lock = contextlib.ExitStack()
        if rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock.enter_context(locked(self.folder, f"{self.folder}: another process trains "
                                           "in this folder; wait for its end, or give another "
                                           "experiment="))
        for folder in (self.folder / "logs", self.folder / "images", self.checkpoints):
            folder.mkdir(parents=True, exist_ok=True)
            sweep_temporary(folder)
        if rank == 0:
            if self.newest() is None:           # of a run that was killed before its first
                (self.folder / "log.jsonl").unlink(missing_ok=True)
            write_text(self.folder / "config.yaml", to_yaml(config))
            self._begin_screen()
            if getattr(config, "wandb", "off") != "off":
                self.wandb = start_wandb(config, self.folder)
        self.before = {number: signal.signal(number, self._stop)
                       for number in {signal.SIGINT, *GIVEN_BACK}}
        heard = self.before[signal.SIGTERM]
        self.stopping = isinstance(heard, Heard) and bool(heard)  # while data were loaded

    def _begin_screen(self) -> None:
        if "SLURM_JOB_ID" not in os.environ:
            import torch
            self.screen = self.folder / "logs" / time.strftime("%Y-%m-%d_%H-%M-%S.log")
            self._on_screen(f"{shlex.join(sys.argv)}  # commit {commit()}, torch "
                            f"{torch.__version__}, on {self.device}")

    def _on_screen(self, text: str) -> None:
        """Keep what is printed in logs/, as slurm/train.sh does for its jobs."""
        if self.screen:
            with open(self.screen, "a", encoding="utf-8") as file:
                file.write(text + "\n")

    def _stop(self, number: int, frame) -> None:
        if self.stopping and number == signal.SIGINT:  # a second Ctrl-C means now
            raise KeyboardInterrupt
        self.stopping, self.signal = True, number

    def close(self) -> None:
        """Restore the previous handlers of signals, and pass on a signal that came."""
        self.lock.close()
        if self.wandb is not None:
            self.wandb.finish()  # else the next run of this process would go on with it
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.signal and callable(handler := self.before.get(self.signal)):
            handler(self.signal, None)

    def should_stop(self, step: int) -> bool:
        """Whether a signal came; the processes of a group ask each other, on log steps."""
        if self.world == 1:
            return self.stopping
        if step % self.config.log_every:
            return False
        import torch
        flag = torch.tensor(float(self.stopping), device=self.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)

    def each(self, function: Callable[[Any], Any], items: Sequence) -> list:
        """shared_out() in this run; Stopped in all processes after a signal to one."""
        group = self.rank, self.world
        found = shared_out(lambda item: None if self.stopping else function(item), items, *group)
        if any(shared_out(lambda _: self.stopping, range(self.world), *group)):
            raise Stopped
        return found

    def _check_same_run(self) -> None:
        """Refuse another configuration in the same folder; changes of FREE keys are printed."""
        before, newest = self.folder / "config.yaml", self.newest()
        saved = (self.folder / "checkpoints").rglob("step_*.pt")  # under another name as well
        if not before.exists() or not any(saved):
            return
        try:
            values = read_yaml(before)
        except ValueError as error:  # the checkpoint has it as well
            if newest is None:
                raise
            print(f"warning: {error}; taken from {newest}", file=sys.stderr)
            values = parse_yaml(load_torch(newest)["config"])
        old, new = (lasting_config(flat_config(each))
                    for each in (values, parse_yaml(to_yaml(self.config))))
        changed = {k: (old.get(k), new.get(k)) for k in {**old, **new} if old.get(k) != new.get(k)}
        text = ", ".join(f"{k}: {a} -> {b}" for k, (a, b) in changed.items())
        free = FREE
        if "steps" in changed and getattr(self.config, "schedule", "") == "constant":
            from optim import DECAY  # imports torch, which no --help waits for
            free, least = (*FREE, "steps"), min(old["steps"], new["steps"])
            if newest and int(newest.stem[5:]) > (1 - DECAY) * least:
                raise ValueError(f"steps={self.config.steps}: {newest} lies in the last fifth of "
                                 f"{least} steps, where lr falls; steps may only change before "
                                 "that")
        if any(k not in free for k in changed):
            raise ValueError(f"{self.folder} was begun with another configuration ({text}); "
                             "give a new experiment= name, or remove the folder to begin anew")
        if changed and self.rank == 0:
            print(f"going on in {self.folder} with {text}", file=sys.stderr)

    # ------------------------------------------------------------------------------------------ log

    def log(self, step: int, **values: Any) -> None:
        """Write one JSON line to log.jsonl, and the same, shorter, to the screen."""
        if self.rank:
            return
        line = {"step": step, "time": round(time.perf_counter() - self.began, 1), **values}
        line = {k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()}
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        from tqdm import tqdm
        text = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}"
                         for k, v in line.items())
        tqdm.write(text)
        self._on_screen(text)
        if self.wandb and ("loss" not in values  # evaluations are sent
                           or self._is_due("numbers", step, self.config.wandb_options.every)):
            self.wandb.log(values, step=step)

    def _is_due(self, what: str, step: int, every: int) -> bool:
        """Whether to send it at this step; then it counts as sent."""
        due = step - self.sent.get(what, -math.inf) >= every
        if due:
            self.sent[what] = step
        return due

    def log_picture(self, step: int, name: str, rgb) -> None:
        """Send a picture (h, w, 3) uint8 to wandb."""
        if self.wandb is None:
            return
        options = self.config.wandb_options
        wanted = {"attention": options.attention, "heads": options.attention, "pca": options.pca}
        if wanted.get(name, True):
            import wandb
            self.wandb.log({f"pictures/{name}": wandb.Image(rgb)}, step=step)  # not a number's name

    def log_gradients(self, step: int, net: Any) -> None:
        """Send norms of the blocks' gradients, and their histogram, to wandb, where asked for."""
        options = getattr(self.config, "wandb_options", WandbOptions())
        wanted = options.gradient_norms or options.gradient_histogram
        if not (self.wandb and wanted and self._is_due("gradients", step, options.every)):
            return
        import torch
        import wandb
        blocks: dict[str, list] = {}
        for name, parameter in net.named_parameters():
            if parameter.grad is not None:
                block = re.match(r"(.*blocks\.\d+|[^.]+(\.[^.]+)?)", name)
                blocks.setdefault(block[0] if block else name, []).append(parameter.grad.flatten())
        joined = {name: torch.cat(parts).float() for name, parts in blocks.items()}
        values: dict[str, Any] = {}
        if options.gradient_norms:
            values |= {f"gradient/{name}": part.norm().item() for name, part in joined.items()}
        if options.gradient_histogram:
            every = torch.cat(list(joined.values())).cpu().numpy()
            values["gradients"] = wandb.Histogram(every)
        self.wandb.log(values, step=step)

    def history(self) -> list[dict]:
        return log_history(self.folder / "log.jsonl")

    def check_finite(self, step: int, loss: float) -> None:
        if not math.isfinite(loss):
            good = self.newest()
            raise ValueError(f"{self.folder}: the loss is {loss} at step {step}, the last good "
                             f"checkpoint {good or 'none'}; lower lr, or look at the data with "
                             "`python data.py check`")

    # ---------------------------------------------------------------------------------- checkpoints

    def newest(self) -> Path | None:
        """The newest checkpoint that is whole; damaged ones are passed over with a word."""
        for path in reversed(self.saved()):
            if path not in self.whole:
                try:
                    check_torch(path)
                except ValueError as error:
                    print(f"warning: {error}; an older checkpoint is tried", file=sys.stderr)
                    continue
                self.whole.append(path)
            return path
        if self.saved():
            raise ValueError(f"{self.checkpoints}: none of {len(self.saved())} checkpoints is "
                             "whole; remove them to begin anew")
        return None

    def saved(self) -> list[Path]:
        """Checkpoints, old to new."""
        return sorted((path for path in self.checkpoints.glob("step_*.pt")
                       if path.stem[5:].isdecimal()), key=lambda path: int(path.stem[5:]))

    def save(self, step: int, is_best: bool = False, **state: Any) -> None:
        """Write a checkpoint with PyTorch's random states, whole or not at all.

        Nothing that is learnt depends on those of Python and NumPy.
        """
        if self.rank:
            return
        import torch
        state |= dict(step=step, config=to_yaml(self.config), torch=torch.get_rng_state(),
                      cuda=torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])
        path = self.checkpoints / f"step_{step:08d}.pt"
        save_torch(state, path)
        self.whole.append(path)
        if is_best:
            with replacing(self.checkpoints / "best.pt") as copy:
                try:
                    os.link(path, copy)
                except OSError:  # a file system without links
                    shutil.copyfile(path, copy)
        for old in self.saved()[:-self.config.keep]:
            old.unlink()

    def resume(self) -> dict | None:
        """The newest checkpoint, its random states restored; None for a fresh start."""
        path = self.newest()
        if path is None:
            return None
        import torch
        state = load_torch(path)
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])
        if self.rank == 0:
            print(f"going on from step {state['step']} ({path})", file=sys.stderr)
        return state

    def exit_code(self) -> int:
        """Exit code after a stop: Slurm's signals ask to be queued again, Ctrl-C does not. The
        folder is free from now on."""
        self.lock.close()
        return 130 if self.signal == signal.SIGINT else REQUEUE


def save_torch(content: dict, path: str | Path) -> None:
    """Write what load_torch() reads, whole or not at all, and wait until it is on the disk."""
    import torch
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:           # of PyTorch, where a disk is full
            raise (error.__context__ if isinstance(error.__context__, OSError) else error) from None
        file.flush()
        os.fsync(file.fileno())


def load_torch(path: Path) -> dict:
    """The dictionary in a file that torch.save wrote."""
    import torch
    check_torch(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, AttributeError,
            LookupError, AssertionError, struct.error, MemoryError, OverflowError) as error:
        raise ValueError(f"{path}: not a file of PyTorch weights, or damaged "
                         f"({type(error).__name__}); expected what train_seg.py or train_ssl.py "
                         "exported, or a DINOv3 checkpoint") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected weights by name")
    return content


def check_torch(path: Path) -> None:
    """Compare the parts of a file of torch.save (a ZIP) with their checksums, which torch.load does
    not; a changed byte would change the cells. Files of before 2020 are no ZIP and have none."""
    try:
        with open(path, "rb") as file:
            if file.read(2) == b"PK":
                with zipfile.ZipFile(file) as parts:
                    if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):
                        raise zipfile.BadZipFile("compressed parts, which PyTorch does not write")
                    if damaged := parts.testzip():
                        raise zipfile.BadZipFile(f"{damaged} does not fit its checksum")
            elif file.tell() == 0:
                raise zipfile.BadZipFile("an empty file")
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError,
            struct.error) as error:
        raise ValueError(f"{path}: damaged ({error}); download or copy it again") from None


def export_path(config: Any) -> Path:
    """The file that a training writes its weights to."""
    return Path(config.export_path or Path(config.output_base_dir, "final_models",
                                           f"{config.experiment}.pt"))


def check_file_can_be_written(path: Path) -> None:
    """Refuse what is a folder itself, or lies below what is none or may not be written."""
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir() or not above.is_dir() or not os.access(above, os.W_OK):
        raise ValueError(f"{path}: cannot be written; expected a file, not a folder, in a folder "
                         "that may be written")


def run_folder(config: Any) -> Path:
    """runs/<experiment>/ of a configuration, which is written into it under its class's name."""
    folder = Path(config.output_base_dir) / "runs" / config.experiment
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{type(config).__name__.lower()}.yaml", to_yaml(config))
    return folder


def log_history(log: Path) -> list[dict]:
    """Lines of a log.jsonl, but for one cut by a crash; of a step logged twice the later one."""
    lines: dict[tuple, dict] = {}
    for text in log.read_text(encoding="utf-8").splitlines() if log.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        lines[line["step"], tuple(sorted(line))] = line
    return sorted(lines.values(), key=lambda line: line["step"])


def flat_config(values: dict, prefix: str = "") -> dict[str, Any]:
    """{'data': {'root': x}} -> {'data.root': x}"""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flat_config(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def lasting_config(values: dict[str, Any]) -> dict[str, Any]:
    """Values to compare when a run goes on: paths below output_base_dir, which may have moved."""
    base = f"{Path(values.get('output_base_dir') or '.')}/"
    return {k: v.removeprefix(base) if isinstance(v, str) else v for k, v in values.items()}


# ------------------------------------------------------------------------------------ files, tables

FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))      # no space on a disk, or quota
HOST = re.sub(r"\W", "-", platform.node())[:40] or "here"
LONGEST = 200                           # bytes of a name, which gets an end such as _labels.tif

@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path beside the file, renamed at the end and removed after a failure."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder; create it for {path.name}")
    name = f"{digest(path.name)[:16]}-{threading.get_ident():x}"    # two threads may write one file
    temporary = path.with_name(f".{name}.{HOST}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        short = re.fullmatch(r"\d+ requested and \d+ written", str(error))  # NumPy, of a full disk
        if short or error.errno and error.filename in (None, str(temporary)):
            code = error.errno or errno.ENOSPC
            raise OSError(code, os.strerror(code), str(path)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(folder: Path, busy: str = "") -> Iterator[None]:
    """Let one process after the other change files of a folder; where there is no lock, at once.

    busy : what to say to a second one, which does not wait then.
    """
    descriptor = None
    try:
        with contextlib.suppress(ImportError, OSError):  # Windows; disks without locks
            import fcntl
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
            except BlockingIOError:
                raise ValueError(busy) from None
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def sweep_temporary(folder: Path) -> None:
    """Remove temporary files of replacing() whose process was killed: here, or a day ago."""
    for path in folder.glob(".*.part"):
        with contextlib.suppress(OSError, ValueError):
            *_, host, process, _ = path.name.split(".")
            if host == HOST and int(process) != os.getpid():
                try:
                    os.kill(int(process), 0)
                except ProcessLookupError:
                    path.unlink()
            elif path.stat().st_mtime < time.time() - 86400:
                path.unlink()


def flat_name(name: str) -> str:
    """A file name for a path from outside, such as an S3 key: plate/A1 -> plate_A1.

    It has no separator, so it stays in its folder; it is UTF-8 and at most LONGEST bytes long.
    """
    parts = [part for part in re.split(r"[/\\]", name) if part not in ("", ".", "..")]
    flat = re.sub(r"[\x00-\x1f\x7f\x85\u2028\u2029\ud800-\udfff]", "_", "_".join(parts).strip())
    flat = re.sub(r"^[-=+@]", "_", flat)  # in a table no formula, on a command line no option
    if flat != "_".join(parts) or not flat or len(flat.encode()) > LONGEST:  # may meet another
        flat = (flat.encode()[:LONGEST - 9].decode(errors="ignore") + "_" + digest(name)[:8])
    return flat


def file_state(path: Path) -> list[int]:
    """Bytes and time of the last change (ns) of a file; empty if there is none."""
    if not path.exists():
        return []
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def write_text(path: str | Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_record(path: Path, advice: str) -> dict[str, Any]:
    """The keys of a JSON file that a script of ours wrote."""
    if not isinstance(record := read_json(path, advice), dict):
        raise ValueError(f"{path}: damaged, holds {record!r:.40} in place of keys; {advice}")
    return record


def read_json(path: Path, advice: str, hook: Callable[[dict], Any] | None = None) -> Any:
    """The content of a JSON file. advice : what to do if it is none; hook : makes objects."""
    try:
        return json.loads(path.read_bytes(), object_hook=hook)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged, no JSON that can be read ({error}); {advice}") from None


def write_table(path: str | Path, rows: Sequence[dict], first: Iterable[str] = ()) -> None:
    """Write rows as CSV or, to a file .tsv, as TSV: columns `first`, then all others of the rows.

    Numbers have up to ten digits; a missing value, None or NaN is an empty cell.
    """
    def text(value: Any) -> str:
        if value is None or value != value:
            return ""
        if isinstance(value, float):
            return f"{value:.10g}"
        return " ".join(str(value).splitlines()).replace("\t", " ").strip()

    columns = list(dict.fromkeys((*first, *(name for row in rows for name in row))))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter="\t" if Path(path).suffix == ".tsv" else ",",
                           lineterminator="\n")
        table.writerow(columns)
        table.writerows([text(row.get(name)) for name in columns] for row in rows)


def read_table(path: str | Path, needed: Iterable[str] = (),
               advice: str = "") -> list[dict[str, str]]:
    """Rows of a table with tabs or commas, stripped; it must have each column `needed` once."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table" + f"; {advice}" * bool(advice))
    rows: list[list[str]] = []
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: Excel puts a mark in front
        delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
        for row in csv.reader(io.StringIO(text), delimiter=delimiter, strict=True):
            if "\n" in "".join(row):  # a remark that begins with a quote swallows lines
                raise csv.Error("a cell in quotes goes on in the next line")
            rows.append([word.strip() for word in row])
    except (csv.Error, UnicodeDecodeError) as error:
        where = f"line {len(rows) + 1}: " * bool(rows)
        raise ValueError(f"{path}: not a table of text ({where}{error}); save it as CSV or TSV in "
                         "UTF-8, with quotes around whole cells only, and each row in one line"
                         ) from None
    while rows and not any(rows[-1]):  # blank lines, or empty cells below the table
        rows.pop()
    names = rows[0] if rows else []
    for name in needed:
        if names.count(name) != 1:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean '{near[0]}'?" if near else f"columns are {listed(names, 12)}"
            raise ValueError(f"{path}: {names.count(name) or 'no'} columns '{name}', expected one; "
                             f"{hint}")
    for number, row in enumerate(rows, 1):
        if len(row) != len(names):
            raise ValueError(f"{path}, line {number}: {len(row)} values, expected {len(names)} as "
                             "in line 1")
    return [dict(zip(names, row)) for row in rows[1:]]


def without_nan(value: Any) -> Any:
    """null for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def listed(names: Sequence[str], count: int = 5) -> str:
    """The first names and the number of others."""
    rest = len(names) - count
    return ", ".join(names[:count]) + (f" and {rest} more" if rest > 0 else "")


def digest(*parts: Any) -> str:
    """SHA-256 of files (Path), arrays and texts; names sorted by it are in a fixed random order."""
    whole = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with open(part, "rb") as file:
                while piece := file.read(1 << 20):
                    whole.update(piece)
        elif hasattr(part, "tobytes"):  # an array: its shape and type count
            whole.update(f"{part.shape} {part.dtype.str} ".encode() + part.tobytes())
        else:
            whole.update(str(part).encode(errors="surrogatepass"))
    return whole.hexdigest()


def start_wandb(config: Any, folder: Path):
    if config.wandb == "offline":  # else it would call home even so
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb
    except ImportError:
        raise ValueError(f"wandb={config.wandb}: the package is not installed; pip install wandb, "
                         "or wandb=off") from None
    options = config.wandb_options
    return wandb.init(project=options.project, entity=options.entity, dir=str(folder),
                      name=options.name or config.experiment, resume="allow",
                      id=config.experiment.replace("/", "."),
                      mode="online" if config.wandb == "on" else config.wandb,
                      settings=wandb.Settings(x_disable_stats=not options.system),
                      config=dataclasses.asdict(config))


# ----------------------------------------------------------------------------------- devices, ranks

Device = typing.Literal["auto", "cpu", "cuda", "mps"]         # mps: Apple's GPUs


def pick_device(name: str) -> str:
    """'auto' -> the GPU if there is one; a missing one that was asked for is an error."""
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")  # what mps lacks runs on the CPU
    import torch
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if name == "auto":
        return next(device for device, found in there.items() if found)
    if not there[name]:
        raise ValueError(f"device={name}: PyTorch finds no {name.upper()} device here; use "
                         "device=cpu or auto")
    return name


def join_group(device: str) -> tuple[int, int, str]:
    """(rank, number of processes, device) of this process, alone or started by torchrun."""
    import torch
    device = pick_device(device)
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return 0, 1, device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return torch.distributed.get_rank(), world, device


def in_group() -> bool:
    """This process is one of several, which torchrun started."""
    group = sys.modules["torch"].distributed if is_loaded("torch") else None
    return bool(group and group.is_available() and group.is_initialized())


def commit() -> str:
    """The version of the code, with a + when files differ from it."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty=+"], text=True, timeout=10,
                              cwd=Path(__file__).parent, capture_output=True)
        return done.stdout.strip() or "unknown"
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def provenance(config: Any, step: int, **more: Any) -> dict:
    """Origin of weights: configuration, step, version; without paths of this machine."""
    import torch
    return dict(config=to_yaml(config, shared=True), step=step, commit=commit(),
                torch=str(torch.__version__), **more)


def shared_out(function: Callable[[Any], Any], items: Sequence, rank: int, world: int) -> list:
    """[function(item) for item in items]: each process of a group does its share, all get all."""
    mine = [function(item) for item in items[rank::world]]
    if world == 1:
        return mine
    import torch
    parts: list[list] = [[] for _ in range(world)]
    torch.distributed.all_gather_object(parts, mine)
    return [parts[number % world][number // world] for number in range(len(items))]


def mean_over_ranks(value, world: int) -> float:
    """Mean of a scalar tensor over all processes."""
    if world > 1:
        import torch
        value = value.clone()
        torch.distributed.all_reduce(value)
    return value.item() / world

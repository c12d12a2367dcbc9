"""Configurations: frozen dataclass <-> YAML <-> `key=value`, and how a script starts and fails.

A script declares one frozen dataclass, every field with a default where one is sane and a comment with unit and
reason (`--help` prints them), and ends with

    if __name__ == "__main__":
        runs.script(__doc__, Config, main)        # python SCRIPT.py [CONFIG.yaml] [key=value ...]

A user's mistake anywhere below raises ValueError or OSError and ends as one line `error: ...`, exit code 1
(DINOCELL_DEBUG=1 shows the traceback).
"""
from __future__ import annotations

import dataclasses
import difflib
import inspect
import os
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any, Callable, TypeVar

import yaml

Config = TypeVar("Config")


# ---------------------------------------------------------------------------------------------- reading

def load(cls: type[Config], path: str | Path | None = None, overrides: list[str] = ()) -> Config:
    """A configuration from a YAML file (or defaults alone), then `key=value`; `a.b=1` reaches into section a."""
    values: dict[str, Any] = {}
    origin = "command line"
    if path is not None:
        origin = str(path)
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such configuration; expected a YAML file, configs/ has some")
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            where = getattr(error, "problem_mark", None)
            raise ValueError(f"{path}: not valid YAML" + (f" in line {where.line + 1}" if where else "")
                             + f": {getattr(error, 'problem', None) or error}") from None
        if not isinstance(values, dict):
            raise ValueError(f"{path}: got a {type(values).__name__}, expected lines `key: value`")
    for text in overrides:
        key, _, value = text.partition("=")
        *sections, last = key.split(".")
        inner = values
        for section in sections:
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise ValueError(f"{text}: '{section}' is a value in {origin}, no section")
        try:
            inner[last] = yaml.safe_load(value) if value else ""
        except yaml.YAMLError:
            inner[last] = value                                # 'a: b' and the like: meant as text
        inner[last] = _Given(inner[last], text)
    return from_dict(cls, values, origin)


class _Given:
    """A value that came as key=value: errors name the argument, and fields of text take it as it was typed."""

    def __init__(self, value: Any, text: str):
        self.value, self.text = value, text


def from_dict(cls: type[Config], values: dict[str, Any], origin: str, prefix: str = "") -> Config:
    """Validate wholly: unknown keys, missing keys and types before anything is touched."""
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in dataclasses.fields(cls)}
    result = {}
    for key, value in values.items():
        source = value.text if isinstance(value, _Given) else origin
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, 0.5)
            hint = f", did you mean '{near[0]}'?" if near else f"; known keys: {', '.join(known)}"
            raise ValueError(f"{source}: unknown key '{prefix}{key}'{hint}")
        result[key] = _convert(value, hints[key], f"{prefix}{key}", source)
    for name, f in known.items():
        if name not in result and f.default is f.default_factory is dataclasses.MISSING:
            raise ValueError(f"{origin}: key '{prefix}{name}' is missing; give {prefix}{name}: {_name(hints[name])}")
    try:
        return cls(**result)
    except ValueError as error:                                # the dataclass's own check of combinations
        raise ValueError(f"{origin}: {error}") from None


def _convert(value: Any, hint: Any, key: str, origin: str) -> Any:
    """YAML's value as the field's type, or an error. 1e-4 is text to PyYAML; 3 serves as a float; no is not 0."""
    typed = value.text.partition("=")[2] if isinstance(value, _Given) else None
    value = value.value if isinstance(value, _Given) else value
    if dataclasses.is_dataclass(hint):
        if isinstance(value, dict):
            return from_dict(hint, value, origin, key + ".")
        raise ValueError(f"{origin}: {key} is {value!r}, expected a section with keys")
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        choices = [h for h in inner if h is not type(None)]
        for choice in choices:
            try:
                return _convert(value if typed is None else _Given(value, f"={typed}"), choice, key, origin)
            except ValueError:
                continue
    elif kind is typing.Literal:
        if isinstance(value, bool):                            # YAML reads no, off, on as truth values
            value = typed or {True: "on", False: "off"}[value]
        if value in inner:
            return value
    elif kind is tuple:
        if isinstance(value, str) and typed is not None:
            value = [yaml.safe_load(part) for part in value.split(",")]
        elif not isinstance(value, (list, tuple)) and value is not None:
            value = [value]
        if value is not None:
            return tuple(_convert(item, inner[0], key, origin) for item in value)
    elif kind is dict or hint is dict:
        if isinstance(value, dict):
            return value
    elif hint is bool:
        if isinstance(value, bool):
            return value
    elif hint is int:
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE]\+?\d+", value):
            value = float(value)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value == int(value):
            return int(value)
    elif hint is float:
        try:
            if not isinstance(value, bool) and value is not None:
                return float(value)
        except (TypeError, ValueError):
            pass
    elif hint is str:
        if typed is not None:
            return typed
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
    raise ValueError(f"{origin}: {key} is {typed if typed is not None else value!r}, expected {_name(hint)}")


def _name(hint: Any) -> str:
    """A type as a person says it."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return " or ".join("null" if h is type(None) else _name(h) for h in inner)
    if kind is typing.Literal:
        return " or ".join(map(str, inner))
    if kind is tuple:
        return f"a list of {_name(inner[0])}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a section"}.get(
        hint, getattr(hint, "__name__", str(hint)))


# ---------------------------------------------------------------------------------------------- writing

def to_yaml(config: Any) -> str:
    """The resolved configuration; load() gives the same dataclass back."""
    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value
    return yaml.safe_dump(plain(dataclasses.asdict(config)), sort_keys=False, allow_unicode=True)


def describe(cls: type) -> str:
    """The keys of a configuration with their defaults and comments, read from its source, for --help."""
    comments = dict(re.findall(r"^    (\w+):[^#\n]*#\s*(.*)$", inspect.getsource(cls), re.MULTILINE))
    lines = []
    for f in dataclasses.fields(cls):
        if f.default is not dataclasses.MISSING:
            default = "null" if f.default is None else str(f.default).lower() if isinstance(f.default, bool) else f.default
        else:
            default = "..."
        lines.append(f"  {f.name}={default}".ljust(30) + " " + comments.get(f.name, ""))
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------- scripts

def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """(files and folders, key=value overrides). What exists as a file is a file, whatever its name."""
    files, overrides = [], []
    for argument in arguments:
        given = re.match(r"[A-Za-z_][\w.]*=", argument) and not os.path.exists(argument)
        (overrides if given else files).append(argument)
    return files, overrides


def script(doc: str, cls: type, main: Callable[..., int | None], arguments: list[str] | None = None) -> None:
    """Run main(config, files) as a command: --help, key=value, errors of one line, exit code.

    A first file that ends in .yaml or .yml is the configuration; the other files go to main.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--help" in arguments or "-h" in arguments:
        print(f"{doc.strip()}\n\nKeys, as key=value or in YAML:\n{describe(cls)}")
        sys.exit(0)

    def run() -> int:
        files, overrides = split_arguments(arguments)
        if unknown := [a for a in files if a.startswith("--")]:
            raise ValueError(f"unknown option {unknown[0]}; options are written key=value, --help lists them")
        given = files.pop(0) if files and files[0].endswith((".yaml", ".yml")) else None
        return main(load(cls, given, overrides), files) or 0

    sys.exit(guarded(run))


def guarded(run: Callable[[], int]) -> int:
    """Exit code of run(); a user's mistake becomes one line on stderr, Ctrl-C a word."""
    try:
        return run()
    except KeyboardInterrupt:
        print("\nstopped; finished parts are kept, the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        if os.environ.get("DINOCELL_DEBUG"):
            raise
        print("error: " + " ".join(_sentence(error).split()), file=sys.stderr)
        return 1


def _sentence(error: Exception) -> str:
    """OSError from the system as `file: reason`; ours and ValueError as they are."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)

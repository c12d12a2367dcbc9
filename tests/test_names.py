"""Names: no file hides a module of Python's, no name stands in two rooms.

Imports the standard library only: it must run whatever is broken.
"""
import ast
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_no_file_hides_a_standard_module():
    names = {p.stem for p in ROOT.glob("*.py")} | {p.name for p in ROOT.iterdir() if p.is_dir()}
    assert "model" in names and not names & sys.stdlib_module_names


def test_no_name_stands_in_two_rooms():
    """But for what every script has: its Config and its main."""
    rooms = defaultdict(set)
    for path in ROOT.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                rooms[node.name].add(path.stem)
    assert {name: sorted(found) for name, found in rooms.items() if len(found) > 1
            and name not in ("Config", "main")} == {}


def test_house_rules():
    """The words that the house bans: each hides a mistake or runs somebody else's code."""
    banned = ["strict=" + "False", "except " + "Exception", "except" + ":",
              "weights_only=" + "False",
              "allow_pickle=" + "True", "yaml." + "load(", "TO" + "DO"]
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        text = path.read_text(encoding="utf-8")
        assert not [word for word in banned if word in text], path.name

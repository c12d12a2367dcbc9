"""A file of ours must not hide a module of Python's. Imports the standard library only: it must run whatever is broken."""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_no_file_hides_a_standard_module():
    names = {p.stem for p in ROOT.glob("*.py")} | {p.name for p in ROOT.iterdir() if p.is_dir()}
    assert "model" in names and not names & sys.stdlib_module_names


def test_house_rules():
    """The words that HOUSE.md bans: each hides a mistake or runs somebody else's code."""
    banned = ["strict=" + "False", "except " + "Exception", "except" + ":", "weights_only=" + "False",
              "allow_pickle=" + "True", "yaml." + "load(", "TO" + "DO"]
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]:
        text = path.read_text(encoding="utf-8")
        assert not [word for word in banned if word in text], path.name

"""What the documents say is so: links, files, commands, keys, numbers; and their programs run.

    python tests/test_docs.py            writes the table of parts in docs/architecture.md anew
"""
import ast
import dataclasses
import importlib
import re
import subprocess
import sys
import typing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
import runs  # noqa: E402

ARCHITECTURE = ROOT / "docs/architecture.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")])
MODULES = {path.stem: path for path in sorted(ROOT.glob("*.py"))}
# files that commands or readers make
MADE = ("ssl.py", "config.yaml", "service.py", "evaluate.md", "table.md")
each_document = pytest.mark.parametrize("path", DOCUMENTS,
                                        ids=lambda path: path.relative_to(ROOT).as_posix())


def blocks(path):
    """(language, text) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(encoding="utf-8"),
                      re.MULTILINE | re.DOTALL)


def prose(path):
    """The text without fenced blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"),
                  flags=re.MULTILINE | re.DOTALL)


# ---------------------------------------------------------------------------------- links and files

def anchors(path):
    """What GitHub makes of the headings."""
    titles = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_document
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        assert there.exists() and ROOT in (there, *there.parents), f"{path.name}: {target}"
        assert not anchor or anchor in anchors(there), f"{path.name}: {target}"


@each_document
def test_files_that_are_named_exist(path):
    """Of our own: scripts, configurations, documents, batch scripts, logs.

    Placeholders and results are passed over.
    """
    names = re.findall(r"`([\w./-]+\.(?:py|yaml|md|sh|jsonl|txt|tsv))`", prose(path))
    for name in names:
        if name.startswith(("runs/", "dat/", "results/", "downstream/",
                            "final_models/")) or name in MADE:
            continue
        if re.match(r"[A-Z]+_", name) or "/" not in name and name.endswith((".jsonl", ".txt",
                                                                            ".tsv")):
            continue                                          # NAME_cells.tsv, records.tsv
        places = [ROOT, path.parent, ROOT / "tests", ROOT / "configs", ROOT / "docs"]
        assert any((place / name).is_file() for place in places), f"{path.name} names {name}"


def test_the_documents_stay_few_and_short():
    """Four of 95 KB together, each with a drawing on its first screens; logs lie in docs/logs/."""
    documents = sorted(ROOT.glob("docs/*.md"))
    assert [path.stem for path in documents] == ["architecture", "instruct", "pretraining",
                                                 "results"]
    assert sum(path.stat().st_size for path in documents) <= 95_000
    assert not [path for path in ROOT.glob("docs/*") if path.suffix in (".tsv", ".jsonl", ".txt")]
    for path in documents:
        assert "```mermaid" in path.read_text(encoding="utf-8")[:4000], path.name
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_tree_of_the_readme_is_the_folder():
    """A line for each file: its name and at most five words."""
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## The files")[1]
    lines = dict(re.findall(r"^(\w+\.py) +(\S.*)$", tree, re.MULTILINE))
    assert set(lines) == {path.name for path in MODULES.values()}
    for name, text in lines.items():
        assert len(text.removeprefix("script: ").split()) <= 5, name


# ----------------------------------------------------------------------------------------- commands

def commands(path):
    """Words of each `python X.py ...`, slurm/train.sh and sbatch line, in shell blocks and in code
    in the text."""
    lines = [line for language, text in blocks(path) if language in ("sh", "bash", "")
             for line in text.splitlines()]
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(path))]
    for line in lines:
        for part in re.split(r"&&|;|\|(?= )", re.sub(r"\s+# .*", "", line)):
            words = part.replace('"', "").split()
            if "slurm/array.sh" in words or "slurm/train.sh" in words:
                yield words[next(i for i, word in enumerate(words) if word.startswith("slurm/")):]
            elif "torchrun" in words[:1]:
                yield ["python", *(word for word in words[1:] if not word.startswith("--"))]
            elif words[:1] == ["python"] and len(words) > 1 and words[1].endswith(".py"):
                yield words


def config_class(script, words):
    """The dataclass that a command's keys belong to, and the words after its verb; None where there
    is none."""
    module = importlib.import_module(Path(script).stem)
    verbs = getattr(module, "VERBS", None)
    if verbs:
        return (verbs[words[0]][0], words[1:]) if words and words[0] in verbs else (None, words)
    if script == "infer.py" and words[:1] == ["export"]:
        return module.Export, words[1:]
    return getattr(module, "Config", None), words


@each_document
def test_commands_name_what_exists(path):
    for words in commands(path):
        script, rest = words[1] if len(words) > 1 else "", words[2:]
        assert (ROOT / words[0]).is_file() or words[0] == "python", words
        if not re.fullmatch(r"[\w./]+\.py", script) or script[:-3].isupper():
            continue                                          # SCRIPT.py
        assert (ROOT / script).is_file(), f"{path.name}: {' '.join(words)}"
        for word in rest:
            if re.fullmatch(r"configs/\S+\.ya?ml", word):
                assert (ROOT / word).is_file(), f"{path.name}: {' '.join(words)}"


@each_document
def test_keys_in_commands_are_known(path):
    """Every key=value stands in the script's configuration; placeholders (DIR, ...) are fine as
    values."""
    for words in commands(path):
        script, rest = words[1] if len(words) > 1 else "", words[2:]
        if not (ROOT / script).is_file() or "/" in script or "|" in " ".join(rest):
            continue
        cls, rest = config_class(script, rest)
        for word in rest:
            key = re.match(r"([a-z_][\w.]*)=", word)
            if key and cls is not None:
                known = cls
                for name in key[1].split("."):
                    fields = {f.name.rstrip("_"): f for f in dataclasses.fields(known)}
                    assert name in fields, f"{path.name}: {' '.join(words)}: {name}"
                    known = section(known, name)
                    if known is None:
                        break


def test_the_container_runs_commands_that_exist():
    """Its commands name scripts, and it takes the wheels that README advises without a GPU."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    scripts = re.findall(r"python (\w+\.py)|\"python\", \"(\w+\.py)\"", text)
    assert len(scripts) >= 3 and all((ROOT / (a or b)).is_file() for a, b in scripts)
    wheels = re.search(r"--index-url (\S+)/\$\{TORCH\}", text)[1]
    assert f"{wheels}/cpu" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "ARG TORCH=cpu" in text and "COPY requirements.txt" in text


def section(cls, name):
    """The dataclass of a field, None for plain values."""
    hint = typing.get_type_hints(cls).get(name)
    return hint if dataclasses.is_dataclass(hint) else None


@each_document
def test_shell_blocks_are_shell(path):
    for language, text in blocks(path):
        if language in ("sh", "bash"):
            done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
            assert done.returncode == 0, f"{path.name}: {done.stderr}"
        if language == "yaml":
            assert yaml.safe_load(text) is not None


# -------------------------------------------------------------------- the table of parts, the house

def imports(name):
    """Files of ours that a file imports anywhere, but for type checks alone."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test,
                                                   ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return sorted(found & MODULES.keys() - {name})


def parts():
    """Parameters and FLOPs of the default network, part by part."""
    import model
    net = model.DINOCell()
    rows, totals = model.cost(net, 224), {}
    lines = ["| part | parameters | GFLOPs at 224 px | share |", "|---|---:|---:|---:|"]
    whole = sum(row[2] for row in rows)
    for side in ("backbone", "decoder"):
        own = [row for row in rows if row[0].startswith(side)]
        totals[side] = sum(row[1] for row in own), sum(row[2] for row in own)
        own.append((f"**{side}**", *totals[side]))
        lines += [f"| {label} | {count:,} | {work / 1e9:.2f} | {work / whole:.1%} |"
                  for label, count, work in own]
    lines.append(f"| **whole** | {sum(row[1] for row in rows):,} | {whole / 1e9:.2f} | 100.0% |")
    larger = " and ".join(f"{sum(row[2] for row in model.cost(net, size)) / 1e9:.1f} GFLOPs at "
                          f"{size} px"
                          for size in (256, 512))
    return "\n".join([*lines, "", f"`python model.py`; the same network takes {larger}."])


PARTS = r"(<!-- generated: parts -->\n)(.*?)(\n?<!-- end -->)"


def test_the_table_of_parts_is_fresh():
    found = re.search(PARTS, ARCHITECTURE.read_text(encoding="utf-8"), re.DOTALL)
    assert found and found[2] == parts(), "run `python tests/test_docs.py`"


def test_no_room_imports_a_script():
    commands_only = ("infer", "train_seg", "train_ssl", "evaluate", "downstream", "instruct")
    for name in MODULES:
        assert not set(imports(name)) & set(commands_only), name


# ----------------------------------------------------------------------------------------- programs

def program(name):
    text = ARCHITECTURE.read_text(encoding="utf-8")
    found = re.search(rf"<!-- run: {name} -->\n```python\n(.*?)^```$", text,
                      re.MULTILINE | re.DOTALL)
    code = found[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 22
    return code


@pytest.fixture
def drawn():
    import synthetic
    field = synthetic.field(3, 160, 12, diameter=32)
    return field.pixels[field.channels.index("AGP")]          # (H, W) uint16


@pytest.fixture
def here(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_fastapi(drawn, here, tmp_path):
    pytest.importorskip("fastapi")
    pytest.importorskip("multipart", reason="FastAPI needs python-multipart for uploads")
    client = pytest.importorskip("fastapi.testclient", reason="FastAPI's test client needs httpx")
    import tifffile

    import data
    import segment
    space = {}
    exec(compile(program("fastapi"), "docs/architecture.md", "exec"), space)
    client = client.TestClient(space["app"])
    tifffile.imwrite(tmp_path / "a.tif", drawn)
    content = (tmp_path / "a.tif").read_bytes()
    answer = client.post("/cells", files={"image": ("a.tif", content)})
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/tiff"
    (tmp_path / "answer.tif").write_bytes(answer.content)
    labels = data.read_labels(tmp_path / "answer.tif")
    np.testing.assert_array_equal(labels, segment.segment(drawn, space["net"]))
    assert labels.max() > 3
    smaller = client.post("/cells?diameter=64", files={"image": ("a.tif", content)})
    assert smaller.status_code == 200 and smaller.content != answer.content
    for name, body in (("a.tif", content[:200]), ("a.txt", b"no image"), ("../../a.tif", b"")):
        refused = client.post("/cells", files={"image": (name, body)})
        said = refused.json()["detail"]
        assert refused.status_code == 422 and "image." in said and "/tmp" not in said


def test_napari(drawn, here, monkeypatch):
    """The window needs a screen and OpenGL, so napari's model of a viewer stands in for it; the
    rest is real."""
    monkeypatch.setenv("QT_QPA_PLATFORM", "offscreen")
    napari = pytest.importorskip("napari")
    qt = pytest.importorskip("qtpy", reason="napari's widgets need Qt", exc_type=ImportError)
    assert qt.QtWidgets
    import segment

    docked, started, viewer = [], [], napari.components.ViewerModel()
    window = SimpleNamespace(add_dock_widget=lambda widget, name: docked.append((widget, name)))
    monkeypatch.setattr(napari, "Viewer", lambda: SimpleNamespace(window=window))
    monkeypatch.setattr(napari, "run", lambda: started.append(True))
    space = {}
    exec(compile(program("napari"), "docs/architecture.md", "exec"), space)
    assert [name for _, name in docked] == ["DINOCell"] and started == [True]
    find = docked[0][0]
    gray = napari.layers.Image(drawn, name="agp", scale=(0.5, 0.5))
    layer = find(image=gray, diameter=0)
    assert (
        isinstance(layer, napari.layers.Labels)
        and layer.name == "agp cells"
        and tuple(layer.scale) == (0.5, 0.5)
    )
    np.testing.assert_array_equal(layer.data, segment.segment(drawn, space["net"]))
    viewer.add_layer(layer)
    stack = napari.layers.Image(np.repeat((drawn[..., None] >> 8).astype(np.uint8), 4, 2), rgb=True)
    assert find(image=stack, diameter=64).data.shape == drawn.shape


if __name__ == "__main__":
    text = ARCHITECTURE.read_text(encoding="utf-8")
    runs.write_text(ARCHITECTURE, re.sub(PARTS, lambda found: found[1] + parts() + found[3], text,
                                         flags=re.DOTALL))

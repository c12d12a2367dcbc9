"""Learning from corrections: python bench/bench_learning.py root=../shared/data [key=value ...]

Corrections are replayed from the truth: images of phase_deepcell2016/train, which no weights here
have seen, are given their true cells in the page, marked as done, and learnt from with its button;
then its test part is segmented with the weights before and after. There are five images to learn
from; cut into halves they are the ten of the longest round, and halves of one image are held out
together. Prints a line for each number of images; seconds are of both cores together.
"""
from __future__ import annotations

import resource
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import edits  # noqa: E402
import images  # noqa: E402
import learning  # noqa: E402
import page  # noqa: E402
import runs  # noqa: E402


@dataclass(frozen=True)
class Config:
    root: str = "../shared/data"            # folder of the data sets
    dataset: str = "phase_deepcell2016"     # with train/ and test/
    channels: tuple[str, ...] | None = ("1",)  # of its images
    weights: str = "tiny"                   # to start from
    counts: tuple[runs.Count, ...] = (1, 2, 5, 10)  # halves of images to learn from
    steps: runs.Count = 300                 # optimiser steps
    work: str | None = None                 # folder to keep; null: a temporary one


def main(config: Config, files: list[str]) -> None:
    sets = {part: data.examples(Path(config.root) / config.dataset / part, config.channels,
                                labels="cells") for part in ("train", "test")}
    with tempfile.TemporaryDirectory() as temporary:
        for count in config.counts:
            folder = Path(config.work or temporary) / f"learn_{count}"
            shutil.rmtree(folder, ignore_errors=True)
            print(line_of(learn(folder, sets["train"], count, config), sets["test"], count),
                  flush=True)


def learn(folder: Path, examples: list, count: int, config: Config) -> dict:
    """Replay the corrections and press the button; returns the round's record, with seconds."""
    folder.mkdir(parents=True)
    truth: dict = {}
    for half in (1, 2):                                       # first a half of every image
        for example in examples[:max(0, count - len(truth))]:
            image, labels = example.image(), example.labels()
            middle = labels.shape[1] // 2
            side = slice(0, middle) if half == 1 else slice(middle, None)
            name = f"{example.name}_A1_{half}"                # two fields of one well: one group
            images.write_image(folder / f"{name}.tif", image._replace(
                pixels=image.pixels[:, :, side]))
            truth[name] = labels[:, side]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    project = page.Project(folder, page.Config(weights=config.weights, browser=False,
                                               learn_steps=config.steps))
    with project:
        for name, labels in truth.items():
            book = project.open(name).book
            book.do(edits.flooded_edit(book, labels, "find"))
            project.of(name)["done"] = True
        project.learning.start()
        watcher = project.learning.watcher
        if watcher:
            watcher.join()
        record = project.learning.status()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if record["state"] != "done":
        raise ValueError(f"the round {record['state']}: {record['problem']}")
    return {**record, "seconds": after.ru_utime + after.ru_stime - before.ru_utime
            - before.ru_stime}


def line_of(record: dict, test: list, count: int) -> str:
    """What a round brought on the test part."""
    before = learning.held_out_scores(record["before"], test, record["diameter_before"], "auto")
    after = learning.held_out_scores(record["after"], test, record["diameter"], "auto")
    held = record["scores"]
    return (f"{count} images: AP@0.5 on test {before['AP@0.5']:.3f} -> {after['AP@0.5']:.3f}, AP "
            f"{before['AP']:.3f} -> {after['AP']:.3f}; on {len(record['held'])} held out "
            f"{held['before']['AP@0.5']:.3f} -> {held['after']['AP@0.5']:.3f}; diameter "
            f"{record['diameter']:g} px, {record['steps']} steps, {record['seconds']:.0f} s of CPU")


if __name__ == "__main__":
    runs.script(__doc__, Config, main)

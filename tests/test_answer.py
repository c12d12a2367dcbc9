"""answer.py, lessons.py, calibration.py: similarity, weights in and out, guardrails."""
import collections
import dataclasses
import math
import re
import zlib

import numpy as np
import pytest
import skimage.data
import torch

import answer
import calibration
import examine
import instruct
import instructions
import lessons
import model
from test_histology import tissue


class Bag:
    """Sentences -> sums of one fixed vector per word: what a text side can learn from, in no time."""
    dim = 48

    def __call__(self, sentences):
        rows = []
        for sentence in sentences:
            row = np.zeros(self.dim)
            for word in re.findall(r"\w+", sentence.lower()):
                row += np.random.default_rng(zlib.crc32(word.encode())).normal(size=self.dim)
            rows.append(row / max(np.linalg.norm(row), 1e-9))
        return torch.tensor(np.array(rows), dtype=torch.float32).reshape(-1, self.dim)


# --------------------------------------------------------------------------------------------------- learning

def test_even_loss_closed_form():
    """Logits 0 cost log 2 on either side, however many stand there; unknown ones cost nothing."""
    member = torch.tensor([[1, -1, -1, -1, 0]], dtype=torch.int8)
    assert math.isclose(lessons.even_loss(torch.zeros(1, 5), member).item(), math.log(2), rel_tol=1e-6)
    sure = torch.tensor([[0.0, 30, 30, 30, 99]])                             # all negatives wrong by 30
    assert math.isclose(lessons.even_loss(sure, member).item(), (math.log(2) + 30) / 2, rel_tol=1e-5)
    empty = torch.full((1, 5), -1, dtype=torch.int8)                         # absent: only negatives count
    assert math.isclose(lessons.even_loss(torch.zeros(1, 5), empty).item(), math.log(2), rel_tol=1e-6)


def test_best_line():
    values, truth = np.array([0.1, 0.2, 0.3, 0.7, 0.9, 0.4]), np.array([0, 0, 0, 1, 1, 1], bool)
    line, score = calibration.best_line(values, truth)
    assert math.isclose(line, 0.35) and score == 1
    for kind, count in (("balanced", lambda hit, false: 0.5 * (hit / 3 + 1 - false / 3)),
                        ("F1", lambda hit, false: 2 * hit / (hit + false + 3))):
        values, truth = np.array([0.1, 0.8, 0.3, 0.7, 0.9, 0.2]), np.array([0, 0, 0, 1, 1, 1], bool)
        every = [count((truth & (values >= t)).sum(), (~truth & (values >= t)).sum())
                 for t in np.arange(0.15, 0.9, 0.1)]
        line, score = calibration.best_line(values, truth, kind)
        assert math.isclose(score, max(every)) and math.isclose(
            count((truth & (values >= line)).sum(), (~truth & (values >= line)).sum()), score)


def test_pooled_is_the_mean_of_each_label():
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(2, 5, 8, 8, generator=generator)
    labels = torch.randint(0, 4, (2, 8, 8), generator=generator)
    mean, area = answer.pooled(plane, labels, 4)
    for b in range(2):
        for i in range(4):
            direct = plane[b][:, labels[b] == i].mean(1)
            assert torch.allclose(mean[b, i], direct / direct.norm(), atol=1e-5)
            assert area[b, i] == (labels[b] == i).sum()


def test_embeddings_of_tiles_cover_any_size():
    """Whatever the tiling, every pixel has an embedding of length 1; small images are mirrored to a tile."""
    net = small_net().eval()
    for size in ((64, 64), (50, 130), (7, 9)):
        with torch.inference_mode():
            plane, tokens = answer.embeddings(torch.rand(3, *size,
                                                         generator=torch.Generator().manual_seed(1)), net)
        assert plane.shape == (net.words.width, *size) and tokens.shape == (32,)
        assert torch.allclose(plane.norm(dim=0), torch.ones(size), atol=1e-4)


def small_net(**words) -> answer.Instructed:
    torch.manual_seed(0)
    words = dict(names=("nuclei", "inflammatory", "mitotic figures"), trained=("nuclei", "inflammatory"),
                 text=Bag.dim, hidden=32,
                 width=8, tissues=("colon",)) | words
    return answer.Instructed(model.ViT(32, 4, 1, 8, 2), (16, 8, 8), 8, model.Settings(tile=64),
                             answer.Words(**words))


def test_weights_round_trip(tmp_path):
    net = small_net(licence=("research only",), belongs=0.25).eval()
    answer.save(net, tmp_path / "x.pt")
    back = answer.load(tmp_path / "x.pt")
    assert back.words.belongs == 0.25 and tuple(back.words.licence) == ("research only",)
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for a, b in zip(net.maps(x), back.maps(x)):
            assert torch.allclose(a, b, atol=2e-2)                           # float16
    with pytest.raises(ValueError, match="not a file of PyTorch weights"):
        (tmp_path / "y.pt").write_bytes(b"no weights")
        answer.load(tmp_path / "y.pt")
    model.save(model.DINOCell(model.ViT(32, 4, 1, 8, 2), (16, 8, 8), 8), tmp_path / "z.pt")
    with pytest.raises(ValueError, match="another kind"):
        answer.load(tmp_path / "z.pt")


@pytest.mark.parametrize("backbone", [model.ViT(32, 4, 1, 8, 2), model.ConvNet(32, 4)])
def test_init_takes_a_whole_network_over(tmp_path, backbone):
    """Whatever its shape: before any training the new network finds the same cells."""
    torch.manual_seed(1)
    settings = model.Settings(tile=96, peak=0.6, depth=0.15, low=2.0, zoom=0.5, diameter=15.0)
    base = model.DINOCell(backbone, (16, 8, 8), 8, settings, stem=3).eval()
    model.save(base, tmp_path / "base.pt")
    record = dict(trained=["nuclei"], regions={}, tissues=[], licence=[])
    config = instruct.Config(init=str(tmp_path / "base.pt"), crop=64)
    net = instruct.build(config, record, ["nuclei"], Bag.dim).eval()
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.allclose(net(x), base(x), atol=1e-5)
    assert net.settings == dataclasses.replace(settings, tile=64, cap=config.cap, zoom=1.0)     # it is trained on whole images
    answer.save(net, tmp_path / "new.pt")
    read = answer.load(tmp_path / "new.pt")
    assert read.architecture["stem"] == 3 and type(read.backbone) is type(backbone)
    with torch.inference_mode():
        assert torch.allclose(read(x), net(x), atol=2e-2)


@pytest.mark.parametrize("targets", [("necrosis", "inflammatory"), ("inflammatory", "necrosis"), ("necrosis",), ("inflammatory",)])
def test_areas_and_cells_are_counted_each_by_itself(targets):
    """Pixels right of the middle are necrosis, the cells in the upper half are inflammatory."""
    net = small_net(trained=("nuclei", "inflammatory", "necrosis"), names=("nuclei", "inflammatory", "necrosis"), regions=("necrosis",),
                    belongs=0.5, pixel=0.5)
    with torch.no_grad():
        net.prototypes.copy_(torch.eye(8)[:3])
        net.offset.fill_(-5.0)
    labels = np.zeros((40, 60), np.int32)
    for number, (y, x) in enumerate([(5, 5), (5, 15), (5, 50), (30, 5), (30, 50)], 1):
        labels[y:y + 5, x:x + 5] = number
    plane = torch.zeros(8, 40, 60)
    plane[2, :, 30:] = plane[7, :, :30] = 1
    view = answer.View(None, labels, torch.eye(8)[[1, 1, 1, 7, 7]], plane, 1.0, 0.0, "")
    vector = net.prototypes[{"inflammatory": 1, "necrosis": 2}[targets[0]]].detach()
    for task in ("count", "segment", "compare")[:2 + (len(targets) == 2)]:
        found, shown = answer.gather(view, vector, answer.Reading(task, targets, "known", None, "", 0.9), net)
        assert dict(zip(targets, found.counts)) == {name: {"inflammatory": 3, "necrosis": 1}[name] for name in targets}
        assert found.count == sum(found.counts) == len(np.unique(shown)) - 1
        assert str(3) in answer.instructions.sentence(found) or "inflammatory" not in targets
        assert (shown[:, 30:] > 0).all() == ("necrosis" in targets) and (shown[6, 6] > 0) == ("inflammatory" in targets)
        assert (shown[6, 52] != shown[30, 40]) == ("inflammatory" in targets)          # a cell lies above the area


# ------------------------------------------------------------------------------------------------ guardrails

def test_stain_tells_he_from_what_is_none():
    he = answer.stain(tissue(3).pixels)[0]
    gray = skimage.data.camera()[None]
    brown = np.broadcast_to(np.array([150, 110, 60], np.uint8)[:, None, None], (3, 50, 50))
    others = {"gray": gray, "gray in colour": np.repeat(gray, 3, 0), "negative": 255 - tissue(3).pixels,
              "brown": brown,
              "blank": np.full((3, 60, 60), 244, np.uint8), "black": np.zeros((3, 60, 60), np.uint8),
              "photograph": skimage.data.chelsea().transpose(2, 0, 1),
              "DAPI": np.stack([np.zeros_like(gray[0]), np.zeros_like(gray[0]), gray[0]])}
    shares = {name: answer.stain(pixels)[0] for name, pixels in others.items()}
    assert he > 0.9 and max(shares.values()) < 0.5, shares
    assert answer.stain(others["blank"])[1] == "an almost empty field"
    assert answer.stain(gray)[1] == "an image of 1 channel, not in colour"
    assert answer.stain(others["gray in colour"])[1] == "a gray image"


def reading(**changes) -> answer.Reading:
    return answer.Reading("count", ("inflammatory",), "known", None, "", 0.9)._replace(**changes)


def view(**changes) -> answer.View:
    """Four cells, two of them along the first axis of the common space."""
    labels = np.zeros((40, 40), np.int32)
    for i, at in enumerate((2, 12, 22, 32), 1):
        labels[at:at + 6, 5:11] = i
    cells = torch.zeros(4, 8)
    cells[:2, 0] = cells[2:, 1] = 1
    return answer.View(tissue(4, size=40, count=0).pixels, labels, cells, None, 0.9, 1.0,
                       "")._replace(**changes)


AXIS = torch.eye(8)[0]


def test_reply_counts_by_similarity():
    net = small_net().eval()
    said = answer.reply(view(), "count the immune cells", AXIS, reading(), net)
    assert said.status == "answer" and said.sentence == "I count 2 inflammatory cells."
    assert set(np.unique(said.labels)) == {0, 1, 2}
    assert said.found.area == 72 / 1600 and instructions.boxes(said.labels) == [[5, 2, 11, 8],
                                                                                [5, 12, 11, 18]]
    none = answer.reply(view(), "count the immune cells", torch.eye(8)[5], reading(), net)
    assert none.status == "answer" and none.sentence == "I see no inflammatory cells in this region."
    assert none.found.count == 0 and not none.labels.any()


def test_presence_asks_for_one_sure_cell():
    """Cells above `belongs` are no answer while none is above `present`."""
    net = small_net(belongs=0.4, present=0.9).eval()
    net.temperature.data, net.offset.data = torch.tensor(0.0), torch.tensor(0.0)      # cosine 1 is .73
    assert not answer.chosen(view(), AXIS[None], net.words, net).any()
    net.words.present = 0.7
    assert answer.chosen(view(), AXIS[None], net.words, net).sum() == 4      # cosine 0 is .5, above .4


@pytest.mark.parametrize("seen, said, kind, words", [
    (dict(stain=0.1, what="a gray image"), {}, "image", "not look like an H&E section: I see a gray image"),
    ({}, dict(kind="untrained", unknown="mitotic figures"), "untrained",
     "not trained to recognise mitotic figures; I can show"),
    ({}, dict(kind="untrained"), "untrained", 'not trained to recognise what "the words" asks for'),
    ({}, dict(kind="invisible", unknown="mitochondria"), "invisible", "I do not know mitochondria in H&E"),
    ({}, dict(kind="nonsense"), "nonsense", 'do not understand "the words"'),
    ({}, dict(tissue="liver"), "tissue",
     "You speak of liver, but this region looks like my training tissue (colon)"),
    (dict(strange=9.0), dict(tissue="liver"), "tissue",
     "and this region looks unlike my training tissue (colon), so that I cannot tell whether it is liver."),
    (dict(strange=9.0), dict(tissue="colon"), "tissue", "You speak of colon, but this region looks unlike"),
    ({}, dict(kind="untrained", unknown="hepatocytes"), "untrained",
     "Hepatocytes belong to liver; this region looks like"),
])
def test_guardrails_ask_back_with_an_empty_mask(seen, said, kind, words):
    net = small_net(tissue=2.0).eval()
    net.prototypes[:] = torch.eye(8)[:2]
    found = answer.reply(view(**seen), "the words", AXIS, reading(**said), net)
    assert found.status == "question" and found.kind == kind
    assert words in found.sentence and "?" in found.sentence
    assert not found.labels.any() and found.found is None
    assert "there are none" not in found.sentence and " no " not in found.sentence
    if kind != "image":
        assert "I see 4 nuclei here" in found.sentence


def test_a_tissue_of_the_training_is_no_contradiction_and_strange_regions_are_named():
    net = small_net(tissue=2.0).eval()
    assert answer.reply(view(), "x", AXIS, reading(tissue="colon"), net).status == "answer"
    strange = answer.reply(view(strange=9.0), "x", AXIS, reading(), net)
    assert strange.status == "answer" and strange.tissue == "unlike" and "with care" in strange.sentence


def test_both_sides_of_a_comparison_are_counted_boxed_and_outlined():
    """Whatever the comparison's own vector is near to."""
    net = small_net().eval()
    net.prototypes[:] = torch.eye(8)[:2]
    said = answer.reply(view(), "more x or y?", torch.eye(8)[5],
                        reading(task="compare", targets=("inflammatory", "nuclei")), net)
    assert said.found.counts == (2, 2) and said.found.count == 4 and set(np.unique(said.labels)) == {0, 1, 2, 3, 4}
    assert said.sentence == "Neither: I see 2 nuclei and 2 inflammatory cells."


def test_what_is_seen_adds_up():
    """Four nuclei, two of them inflammatory, however near the others come to more than one class."""
    net = small_net(trained=("nuclei", "inflammatory", "epithelial"), names=("nuclei", "inflammatory", "epithelial")).eval()
    net.prototypes[:] = torch.eye(8)[:3]
    assert answer.seen(view(), net) == "I see 4 nuclei here, among them 2 inflammatory cells."
    near = view(cells=torch.nn.functional.normalize(torch.tensor([[0, 1, 0.9] + [0] * 5] * 4, dtype=torch.float32)))
    net.words.belongs = net.words.present = 0.01
    assert answer.seen(near, net) == "I see 4 nuclei here, among them 4 inflammatory cells."
    assert answer.seen(view(cells=torch.zeros(0, 8)), net) == "I see no nuclei here."


def test_more_than_three_channels_are_a_question():
    net = small_net().eval()
    stack = np.random.default_rng(0).integers(0, 60000, (5, 64, 64)).astype(np.uint16)
    seen = answer.look(stack, net)
    said = answer.reply(seen, "count the nuclei", AXIS, reading(), net)
    assert said.status == "question" and "I see an image of 5 channels" in said.sentence


def test_confidence_below_the_line_is_never_followed():
    """Heads that say known but are unsure of the rest: interpret() names the next best reason."""
    net = small_net(known=0.5)
    sure = torch.full((1, 7), -9.0).index_fill_(1, torch.tensor([1]), 9.0)
    names = torch.tensor([[-9.0, 9.0, -9.0]])
    none = torch.tensor([[9.0] + [0.0] * len(instructions.TISSUES)])

    def read(kind, names=names):
        return answer.interpret(answer.Understood(AXIS[None], sure, torch.tensor([kind]), names, none),
                                net.words)[0]
    assert read([9.0, 0, 0, 0]).kind == "known" and read([9.0, 0, 0, 0]).targets == ("inflammatory",)
    assert read([0.2, 0, 0.1, 0]).kind == "invisible"
    assert read([0.0, 9.0, 0, 0]).kind == "untrained"
    unnamed = read([9.0, 0, 0, 1.0], torch.tensor([[-9.0, -9.0, 9.0]]))
    assert unnamed.kind != "known" and unnamed.unknown == "mitotic figures" and unnamed.targets == ()
    both = read([0.0, 9.0, 0, 0], torch.tensor([[-9.0, 9.0, 9.0]]))
    assert (both.kind, both.targets, both.unknown) == ("untrained", ("inflammatory",), "mitotic figures")
    hello = read([0.0, 0, 0, 9.0], torch.full((1, 3), -9.0))
    assert (hello.kind, hello.task, hello.targets, hello.unknown) == ("nonsense", "", (), None)


def test_judged_is_the_check_that_should_have_told():
    """Nonsense that only the stain check stopped was not recognised; an untrained thing beside a trained one counts apart."""
    line = dict(kind="nonsense", targets=[], status="question", task="", tissue="")
    right, counted = collections.Counter(), []
    stopped = answer.reply(view(stain=0.1, what="a gray image"), "x", AXIS, reading(kind="nonsense"), small_net().eval())
    told = answer.reply(view(), "x", AXIS, reading(kind="nonsense"), small_net().eval())
    for reply in (stopped, told):
        examine.judge(line, reply, set(), right, counted)
    assert right == {("asked back: nonsense", False): 1, ("asked back: nonsense", True): 1} and not counted
    right.clear()
    examine.judge(line | dict(kind="untrained", targets=["necrosis", "nuclei"]), told, set(), right, counted)
    assert list(right) == [("asked back: untrained beside a trained concept", True)]
    right.clear()
    known = dict(kind="known", targets=["inflammatory"], status="answer", task="presence", count=2)
    for reply in (answer.reply(view(), "x", AXIS, reading(task="presence"), small_net().eval()), told):
        examine.judge(known, reply, set(), right, counted)
    assert right["presence: yes or no", True] == right["presence: yes or no", False] == 1
    assert right["false alarm of the text check", True] == 1 and right["false alarm of the stain check", True] == 0
    assert counted == [(2, 2)]

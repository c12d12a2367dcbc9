"""instructions.py: the ontology, the grammar and its sentences, an LLM that rewords them."""
import http.server
import json
import re
import threading

import numpy as np
import pytest

import histology
import instructions
from instructions import Found


# ------------------------------------------------------------------------------------------------- ontology

def test_a_class_counts_for_its_ancestors_and_says_nothing_of_finer_ones():
    classes = ["fibroblast", "connective", "inflammatory", "nuclei", "other"]
    assert instructions.membership(classes, ["connective"]).tolist() == [1, 1, -1, 0, -1]
    assert instructions.membership(classes, ["fibroblast"]).tolist() == [1, 0, -1, 0, -1]
    assert instructions.membership(classes, ["nuclei"]).tolist() == [1] * 5
    assert instructions.membership(classes, ["connective"], exclude=True).tolist() == [-1, -1, 1, 0, 1]
    assert instructions.membership(classes, ["fibroblast", "inflammatory"]).tolist() == [1, 0, 1, 0, -1]


def test_every_parent_exists_and_every_class_of_a_source_is_known():
    assert {c.parent for c in instructions.CONCEPTS.values()} - {None} <= instructions.CONCEPTS.keys()
    assert all(name in instructions.CONCEPTS for table in histology.CLASSES.values()
               for name in table.values())


def test_lots_share_no_template_and_held_out_words_are_not_trained():
    for task, lots in instructions.TEMPLATES.items():
        assert task in instructions.TASKS and len(set().union(*lots.values())) == sum(map(len, lots.values()))
    words = [set(c.words) | set(c.held) for c in instructions.CONCEPTS.values()]
    assert sum(map(len, words)) == len(set().union(*words))                  # no word means two things
    for table in (instructions.UNTRAINED, instructions.INVISIBLE, instructions.CHATTER):
        assert len(set().union(*table.values())) == sum(map(len, table.values()))
    grammar = instructions.Grammar(["inflammatory"], seed=1, typos=0)
    texts = [grammar.ask("train", "count", ["inflammatory"]).text.lower() for _ in range(300)]
    assert not [t for t in texts if any(h in t for h in instructions.CONCEPTS["inflammatory"].held)]
    assert len(set(texts)) > 100


def test_grammar_repeats_itself_and_typos_change_words():
    plain, rough = (instructions.Grammar(["epithelial"], 3, typos) for typos in (0, 1))
    again = instructions.Grammar(["epithelial"], 3, 0)
    first = [plain.ask("train", "exclude", ["epithelial"], "liver") for _ in range(50)]
    assert first == [again.ask("train", "exclude", ["epithelial"], "liver") for _ in range(50)]
    assert all("liver" in i.text.lower() and i.targets == ("epithelial",) for i in first)
    known = set(re.findall(r"\w+", " ".join(i.text.lower() for i in first)))
    typed = set(re.findall(r"\w+", " ".join(rough.ask("train", "exclude", ["epithelial"],
                                                      "liver").text.lower()
                                           for _ in range(50))))
    assert len(typed - known) > 10


def test_sentences():
    one = Found("count", ("inflammatory",), (1,), 1, 0.01, 80.0, "")
    assert instructions.sentence(one) == "I count 1 inflammatory cell."
    assert instructions.sentence(one._replace(count=0,
                                              counts=(0,))) == "I see no inflammatory cells in this region."
    assert instructions.sentence(one._replace(task="presence", count=3, counts=(3,),
                                              targets=("nuclei",))) == \
        "Yes, I see 3 nuclei in this region."
    two = Found("compare", ("epithelial", "connective"), (4, 9), 13, 0.1, 80.0, "")
    assert instructions.sentence(two) == "There are more stromal cells (9) than epithelial cells (4)."
    assert instructions.sentence(two._replace(counts=(2, 2))).startswith("Neither")
    assert instructions.refusal("untrained", "x", "mitotic figures", ["inflammatory"]).startswith(
        "I was not trained to recognise mitotic figures; I can show inflammatory cells.")


def test_place():
    assert instructions.place_of(np.array([[1, 1], [2, 2], [99, 99]]), (100, 100)) == "upper left"
    assert instructions.place_of(np.array([[50.0, 50.0]]), (100, 100)) == "centre"
    assert instructions.place_of(np.argwhere(np.ones((9, 9))) * 11, (100, 100)) == ""


# ------------------------------------------------------------------------------------------------------- llm

class Stub(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint that answers with what `said` holds."""
    said, asked = "", []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, self.headers.get("Authorization"), body))
        reply = json.dumps({"choices": [{"message": {"content": self.said}}]}
                           if self.said is not None else {"error": "no"})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(reply.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def stub():
    server = http.server.HTTPServer(("127.0.0.1", 0), Stub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Stub.asked = []
    yield instructions.LLM(url=f"http://127.0.0.1:{server.server_port}/v1/", model="stub")
    server.shutdown()
    server.server_close()


def test_llm_rewrites(stub, monkeypatch):
    monkeypatch.setenv("DINOCELL_LLM_KEY", "secret")
    Stub.said = '"Kindly mark each lymphoid cell"'
    assert instructions.rewrite("highlight the lymphocytes", stub) == "Kindly mark each lymphoid cell"
    (path, key, body), = Stub.asked
    assert path == "/v1/chat/completions" and key == "Bearer secret" and body["model"] == "stub"
    assert body["messages"][-1] == {"role": "user", "content": "highlight the lymphocytes"}
    Stub.said = "Sure! Here are some:\n1. ..."
    assert instructions.rewrite("highlight the lymphocytes", stub) == "highlight the lymphocytes"
    Stub.said = None
    with pytest.raises(ValueError, match="no chat completion"):
        instructions.rewrite("highlight the lymphocytes", stub)


def test_llm_needs_a_model_and_a_web_address():
    with pytest.raises(ValueError, match="expected http"):
        instructions.LLM(url="file:///etc/passwd", model="m")
    with pytest.raises(ValueError, match="name of a model"):
        instructions.LLM(url="http://localhost/v1")


def test_amounts_in_words():
    said = [instructions.amount(*pair) for pair in ((1, "cell nuclei"), (1, "glomeruli"), (2, "glomeruli"), (1, "necrosis"),
                                                    (3, "necrosis"), (0, "plasma cells"), (1, "plasma cells"))]
    assert said == ["1 cell nucleus", "1 glomerulus", "2 glomeruli", "1 area of necrosis", "3 areas of necrosis",
                    "no plasma cells", "1 plasma cell"]


def test_untrained_beside_trained():
    grammar = instructions.Grammar(("nuclei", "inflammatory"), 0, typos=0)
    drawn = [grammar.ask_in_vain("held-out", "untrained") for _ in range(200)]
    both = [said for said in drawn if len(said.targets) == 2]
    assert 30 < len(both) < 90 and {said.task for said in both} == set(instructions.TASKS) - {"exclude"}
    for said in both:
        unknown, known = said.targets
        assert unknown not in grammar.trained and known in grammar.trained and unknown.lower() in said.text.lower()

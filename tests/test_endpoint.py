"""Judges and readers behind an endpoint, against a server that speaks OpenAI's protocol, and speaks it badly."""

from __future__ import annotations

import base64
import io
import json
import logging
import pickle
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from PIL import Image

pytest.importorskip("openai")

from mllm_fast import VLM
from mllm_fast.core.errors import EndsRunError, InputError
from mllm_fast.evaluation.datasets import scene_pairs
from mllm_fast.evaluation.joint.caption_score import CaptionJudge
from mllm_fast.evaluation.judges import object_lists, object_pairs
from mllm_fast.evaluation.judges.agreement import Labelled, agreement, agreement_report, read_labels
from mllm_fast.evaluation.judges.endpoint import Endpoint, Unanswered, cost
from mllm_fast.evaluation.judges.judge import Comparison, Unjudged, shapes_judge
from mllm_fast.evaluation.judges.judge_endpoint import EndpointJudge
from mllm_fast.evaluation.judges.object_pairs import parse
from mllm_fast.evaluation.judges.reader_endpoint import EndpointReader
from mllm_fast.evaluation.run import run
from mllm_fast.evaluation.samples import scenes
from mllm_fast.evaluation.studies.knockout_sweep import KnockoutSweep
from mllm_fast.evaluation.studies.yes_no import Mme
from mllm_fast.evaluation.worker import ModelChoice, rows_of

KEY = "sk-secret-0123456789"
GOOD = json.dumps({"a": ["dog", "ball"], "b": ["puppy"], "pairs": [[0, 0]]})


class Server(ThreadingHTTPServer):
    """Answers with what stands in `replies`, in turn: a text, (status, headers), "silence", or None for a refusal."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list = []
        self.asked: list[dict] = []
        self.keys: list[str] = []
        self.raw = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(body)
        self.server.keys.append(self.headers["Authorization"])
        reply = self.server.replies.pop(0)
        if reply == "silence":
            time.sleep(1.0)
            return
        if isinstance(reply, tuple) and "message" in reply[1]:
            return self._send(reply[0], {"error": reply[1]}, {})
        if isinstance(reply, tuple):
            status, headers = reply
            return self._send(status, {"error": {"message": f"bad key {KEY}"}}, headers)
        message = {"role": "assistant", "content": reply, "refusal": "I cannot" if reply is None else None}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 30, "completion_tokens": 12, "total_tokens": 42}
        if self.server.raw:
            return self._send(200, "<html>", {"Content-Type": "text/html"})
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "judge", "choices": [choice]}
        self._send(200, {**answer, "usage": usage}, {})

    def _send(self, status: int, content: dict, headers: dict) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(data))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.02,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def judge(server, tmp_path) -> EndpointJudge:
    return make(server, cache=tmp_path / "cache")


def make(server: Server, **options) -> EndpointJudge:
    settings = {"attempts": 3, "timeout": 0.4, "pause": 0.01, "api_key": KEY, "base_url": server.url} | options
    return EndpointJudge(Endpoint("judge", **settings), "pairs")


@pytest.mark.parametrize(
    "around",
    [
        "{}",
        "```json\n{}\n```",
        "Here is the JSON you asked for:\n```\n{}\n```\nI hope that {{this}} helps.",
        '<think>The dog is {{a puppy}}, or {{"a": 1}}.</think>\n{}',
        "so it is a dog.</think> {}",
        "<Reasoning>\nmany words\n</Reasoning>\n\nSure! {} Done.",
        '{{"a": [], "b": [], "pairs": []}} no, rather: {}',
        '{{"answer": {}}}',
    ],
)
def test_what_stands_around_an_answer_is_left_out(server, judge, around):
    """Nothing is paid for twice."""
    server.replies = [around.format(GOOD)]
    assert judge.compare("a dog with a ball", "a puppy").counts == {"tp": 1, "fp": 0, "fn": 1}
    assert judge.compare("a dog with a ball", "a puppy").tokens == 0  # from the cache, as it came
    assert len(server.asked) == 1


def test_an_endpoint_that_takes_no_temperature(server, judge):
    """It is asked again without one, at once, and later questions come without."""
    server.replies = [(400, {"message": "Unsupported value: 'temperature' does not support 0 with this model."}), GOOD]
    assert judge.compare("a dog with a ball", "a puppy").counts == {"tp": 1, "fp": 0, "fn": 1}
    server.replies = [GOOD]
    judge.compare("a dog", "a cat")
    assert [one.get("temperature") for one in server.asked] == [0, None, None]
    server.replies = [(400, {"message": "no such field: temperature"})]
    with pytest.raises((EndsRunError, Unjudged)):  # once more is enough
        judge.compare("a dog", "a bird")


def test_a_good_answer(server, judge):
    server.replies = [GOOD]
    found = judge.compare("a dog with a ball", "a puppy")
    assert found == Comparison(["dog", "ball"], ["puppy"], ["puppy"], ["ball"], 42)
    assert found.counts == {"tp": 1, "fp": 0, "fn": 1}
    (asked,) = server.asked
    assert asked["model"] == "judge"
    assert asked["temperature"] == 0
    assert [m["role"] for m in asked["messages"]] == ["system", *["user", "assistant"] * 3, "user"]
    assert "a puppy" in asked["messages"][-1]["content"]
    assert server.keys == [f"Bearer {KEY}"]


def test_worked_examples_are_of_the_form_asked_for():
    for _, _, reply in object_pairs.EXAMPLES:
        parse(json.dumps(reply))
    assert len(object_lists.EXAMPLES) == 3
    for _, _, reply in object_lists.EXAMPLES:  # whose own arithmetic is right
        found = object_lists.parse(reply).counts
        told = {line.split(": ")[0]: line.split(": ")[1] for line in reply.splitlines()[-2:]}
        tp, said, there = found["tp"], found["tp"] + found["fp"], found["tp"] + found["fn"]
        assert told == {"Precision": f"{tp}/{said}" if said else "0", "Recall": f"{tp}/{there}"}


LISTS = """**Thoughts:** The cars are one entry: both are "car".
1. Objects in the ground truth: car, tree, man
True Positives (TP): Car.
**False positives:**
- dog
* a bench;
False negatives: tree; man, tree
Precision: 9/9
Recall: 1/7"""


def test_a_judge_that_thinks_in_words(server):
    """As in the paper: the lists count, each object once and without its properties, and not the judge's arithmetic."""
    judge = EndpointJudge(Endpoint("judge", base_url=server.url, api_key=KEY, attempts=2, pause=0.01))
    server.replies = [LISTS]
    found = judge.compare("a red car, a blue car, a tree, a man", "a car, a dog, a bench")
    assert found == Comparison(["car", "tree", "man"], ["car", "dog", "a bench"], ["car"], ["tree", "man"], 42)
    assert found.counts == {"tp": 1, "fp": 2, "fn": 2}
    (asked,) = server.asked
    assert [m["role"] for m in asked["messages"]] == ["system", *["user", "assistant"] * 3, "user"]
    assert judge.settings["style"] == "lists"
    server.replies = ["True positives: car", LISTS]  # the first lacks lists and is asked for again
    assert judge.compare("x", "y").tokens == 84
    with pytest.raises(ValueError, match="'dog' is in two lists"):
        object_lists.parse("True positives: dog\nFalse positives: Dog\nFalse negatives: none")
    nothing = object_lists.parse("True positives: none\nFalse positives:\nFalse negatives: None")
    assert nothing.counts == {"tp": 0, "fp": 0, "fn": 0}
    with pytest.raises(InputError, match="style"):
        EndpointJudge(Endpoint("judge", base_url=server.url, api_key=KEY), "words")


@pytest.mark.parametrize(
    ("failures", "why"),
    [
        ([(429, {"retry-after": "0"})], "status 429"),
        ([(500, {}), (503, {"retry-after": "soon"})], "status 50"),
        (["silence"], "no answer within 0.4 s"),
        (["certainly! the objects are a dog"], "cannot be read"),
        ([None], "refused or said nothing"),
        ([""], "refused or said nothing"),
    ],
)
def test_failures_are_tried_again_and_then_unjudged(server, judge, failures, why):
    server.replies = [*failures, GOOD]
    paid = sum((isinstance(reply, str) and reply != "silence") or reply is None for reply in failures)
    found = judge.compare("a dog", "a puppy")
    assert found.matched == ["puppy"]
    assert found.tokens == 42 * (1 + paid)
    server.replies = failures[-1:] * 3
    with pytest.raises(Unjudged, match=f"{why}.*3 attempts"):
        judge.compare("a dog", "a cat")
    assert not server.replies


def test_a_wait_that_is_asked_for_is_kept(server, monkeypatch):
    waits = []
    monkeypatch.setattr("mllm_fast.evaluation.judges.endpoint.time.sleep", waits.append)
    server.replies = [(429, {"retry-after": "7"}), (503, {}), (500, {}), (429, {"retry-after": "9999"}), GOOD]
    make(server, attempts=5, pause=1.0).compare("a", "b")
    assert waits == [7, 2, 4, 60]


def test_after_a_refused_key_the_next_run_does_all(server, judge, tmp_path):
    """No sample is written off for what is no fault of its own."""
    sweep = KnockoutSweep(judge=judge)
    todo = scenes(2)
    server.replies = [(401, {})]
    with pytest.raises(EndsRunError, match="status 401"):
        run(sweep, todo, ModelChoice(), tmp_path / "rows")
    server.replies = [GOOD] * 100
    rows = run(sweep, todo, ModelChoice(), tmp_path / "rows")
    assert all("tp" in row for one in rows.values() for row in one)


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_request_refused_as_such_ends_the_run_and_tells_no_key(server, judge, status):
    server.replies = [(status, {})]
    with pytest.raises(EndsRunError, match=f"status {status}") as caught:
        judge.compare("a dog", "a puppy")
    assert KEY not in str(caught.value)


def test_nothing_is_paid_for_twice_and_no_key_is_written(server, judge, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    server.replies = ["nonsense", GOOD]
    first = judge.compare("a dog", "a puppy")
    again = make(server, cache=tmp_path / "cache").compare("a dog", "a puppy")
    assert again == first._replace(tokens=0)
    assert len(server.asked) == 2
    files = list((tmp_path / "cache").iterdir())
    assert len(files) == 1
    assert KEY not in files[0].read_text() + caplog.text + json.dumps(judge.settings) + repr(judge)
    other = EndpointJudge(Endpoint("other", base_url=server.url, api_key=KEY, cache=tmp_path / "cache"), "pairs")
    server.replies = [GOOD]
    assert other.compare("a dog", "a puppy").tokens == 42


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[]", "no JSON object"),
        ('{"a": [], "b": []}', "no JSON object"),
        ('{"a": "dog", "b": [], "pairs": []}', '"a" is no list'),
        ('{"a": [], "b": [1], "pairs": []}', '"b" is no list'),
        ('{"a": ["x"], "b": ["y"], "pairs": [[0, 1]]}', "pairs of places"),
        ('{"a": ["x"], "b": ["y"], "pairs": [[-1, 0]]}', "pairs of places"),
        ('{"a": ["x"], "b": ["y"], "pairs": [[true, 0]]}', "pairs of places"),
        ('{"a": ["x"], "b": ["y", "z"], "pairs": [[0, 0], [0, 1]]}', "paired twice"),
        ('{"a": ["x", "w"], "b": ["y"], "pairs": [[0, 0], [1, 0]]}', "paired twice"),
    ],
)
def test_answers_of_another_form(text, why):
    with pytest.raises(ValueError, match=why):
        parse(text)


def test_a_fence_is_taken_off():
    assert parse(f"```json\n{GOOD}\n```") == parse(GOOD)


def test_the_unjudged_are_counted_and_left_out(server, judge):
    """A sweep over a model that always says the same; every second description finds the judge speechless."""
    server.replies = [reply for _ in range(20) for reply in (GOOD, None, None, None)]
    text = SimpleNamespace(layers=[0])
    vlm = SimpleNamespace(text=text, generate=lambda *a, **k: SimpleNamespace(text=f"a dog {len(server.asked)}"))
    sweep = KnockoutSweep(judge=pickle.loads(pickle.dumps(judge)))
    report = sweep.report({"one": sweep.rows(vlm, SimpleNamespace(image=None))})
    assert report.figures["unjudged"] == 3
    assert report.figures["judge_tokens"] == (4 + 3 * 3) * 42
    assert any("3 of 7 descriptions are unjudged" in sentence for sentence in report.says)
    f1 = [mean["f1"][0] for mean in report.figures["means"]]
    assert [value is None for value in f1] == [False, True] * 3 + [False]
    assert f1[0] == pytest.approx(2 / 3)


def test_no_key(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="set OPENAI_API_KEY"):
        Endpoint("judge")


def test_what_was_kept_for_another_way_of_reading_is_asked_again(server, tmp_path):
    endpoint = Endpoint("judge", base_url=server.url, api_key=KEY, cache=tmp_path)
    server.replies = ["yes", GOOD]
    asked = [{"role": "user", "content": "?"}]
    assert endpoint.ask(asked, str.strip) == ("yes", 42)
    assert endpoint.ask(asked, str.strip) == ("yes", 0)
    assert endpoint.ask(asked, parse)[1] == 42
    assert not server.replies


def test_questions_to_a_language_model_that_has_a_description(server, tmp_path):
    """Answered, said vaguely, and never answered: the last one's image is left out of that row, and counted."""
    settings = {"base_url": server.url, "api_key": KEY, "attempts": 2, "pause": 0.01, "timeout": 1}
    reader = EndpointReader(Endpoint("reader", **settings))
    vlm = VLM.from_pretrained("shapes")
    listed = scene_pairs(3).list
    evaluation = pickle.loads(pickle.dumps(Mme((), reader=reader, price=0.1)))
    # two questions an image
    truths = [question.truth for sample in listed for question in sample.questions]
    good = ["Yes." if truth else "no" for truth in truths]
    server.replies = [good[0], good[1], good[2], "It depends", good[4], (500, {}), (500, {})]
    rows = {sample.name: rows_of(evaluation, vlm, sample) for sample in listed}
    report = evaluation.report(rows)
    found = report.figures["total"]["description to LLM"]
    assert found["ACC"] == 75
    assert found["ACC+"] == 50
    assert found["neither"] == 25
    assert any("its answers took 210 tokens, about $0.00" in sentence for sentence in report.says)
    row = next(row for row in report.tables[0].rows if row[0] == "description to LLM")
    assert row[:4] == ["description to LLM", "75.0", "50.0", "25.0"]
    read = vlm.processor.tokenizer(listed[0].questions[0].text, add_special_tokens=False).input_ids
    assert float(row[4]) > len(read)  # the description's tokens and the question's
    assert report.figures["total"]["full"]["ACC"] > 50
    assert any("1 of 3 images are left out, without an answer: status 500" in sentence for sentence in report.says)
    asked = server.asked[0]["messages"][1]["content"]
    assert asked.startswith("Description: a ")
    assert listed[0].questions[0].text in asked
    server.replies = [None, None]
    with pytest.raises(Unanswered):
        reader.answer("a dog", "is there a dog?")


def test_a_text_that_is_refused_is_no_fault_of_the_key(server, judge):
    """Once the endpoint has answered, a refusal is of what was asked: too long, or not to be talked of."""
    server.replies = [GOOD, (400, {}), GOOD]
    judge.compare("a dog", "a puppy")
    with pytest.raises(Unjudged, match="status 400"):
        judge.compare("a dog", "something else")
    judge.compare("a dog", "a cat")
    server.replies = [(401, {})]
    with pytest.raises(EndsRunError, match="status 401"):
        judge.compare("a dog", "a third")


def test_what_is_no_endpoint(server, judge):
    server.replies = ["<html>"]
    server.raw = True
    with pytest.raises(EndsRunError, match="does not speak OpenAI's protocol"):
        judge.compare("a dog", "a puppy")


def test_what_a_judge_did_not_answer_is_asked_again(server, tmp_path):
    sweep = KnockoutSweep(judge=make(server, cache=tmp_path / "cache", attempts=1))
    server.replies = [(500, {}), *[GOOD] * 100]
    first = run(sweep, scenes(2), ModelChoice(), tmp_path / "rows")
    assert [sum("unjudged" in row for row in rows) for rows in first.values()] == [1, 0]
    asked = len(server.asked)
    again = run(sweep, scenes(2), ModelChoice(), tmp_path / "rows")
    assert not any("unjudged" in row for rows in again.values() for row in rows)
    assert len(server.asked) <= asked + 1  # the others are kept
    assert again["scene 1"] == first["scene 1"]


def test_cost():
    assert cost(1_234_567, None) == "1,234,567 tokens"
    assert cost(2_500_000, 0.4) == "2,500,000 tokens, about $1.00"


def write(path, *lines):
    path.write_text("\r\n".join(lines), encoding="utf-8-sig")
    return path


def test_agreement_by_hand(server, judge, tmp_path):
    """People see a circle that the vocabulary takes for another; the endpoint agrees with them on all but a ball."""
    path = write(
        tmp_path / "labels.csv",
        "said,reference,object,label",
        'a red circle,"a red circle, a blue star",The Red  circle,tp',
        'a red circle,"a red circle, a blue star",blue star,FN',
        "a red ring,a red circle,red ring,TP",
        ",a red circle,,",
    )
    pairs = read_labels(path)
    assert pairs[0] == Labelled(
        "a red circle, a blue star", "a red circle", {("red circle", "tp"): 1, ("blue star", "fn"): 1}
    )
    assert [len(pair.labels) for pair in pairs] == [2, 1, 0]
    server.replies = [
        json.dumps({"a": ["red circle", "blue star", "ball"], "b": ["red circle"], "pairs": [[0, 0]]}),
        json.dumps({"a": ["red circle"], "b": ["red ring"], "pairs": [[0, 0]]}),
        *[None] * 3,
    ]
    report = agreement_report(pairs, {"vocabulary": shapes_judge(), "endpoint": judge}, 10.0)
    found = report.figures["agreement"]
    # the vocabulary: red circle TP, blue star FN; red ring FP, red circle FN; red circle FN
    assert found["people, vocabulary"] == {"same": 2, "people": 3, "vocabulary": 5, "agreement": 0.5}
    # the endpoint: one label too many, and nothing of the third pair
    assert found["people, endpoint"] == {"same": 3, "people": 3, "endpoint": 4, "agreement": pytest.approx(6 / 7)}
    assert found["vocabulary, endpoint"]["same"] == 2
    assert any("endpoint gave no usable answer on 1 pairs" in sentence for sentence in report.says)
    assert any("endpoint took 210 tokens, about $0.00" in sentence for sentence in report.says)
    assert agreement([None], [Counter()]) == (0, 0, 0)


def test_labels_to_correct(tmp_path):
    """What the sweep writes is what is read."""
    sweep = KnockoutSweep()
    rows = sweep.rows(VLM.from_pretrained("shapes"), scenes(1).list[0])
    report = sweep.report({"one": rows})
    path = tmp_path / "labels.csv"
    path.write_text(report.files["labels.csv"])
    pairs = read_labels(path)
    assert {pair.said for pair in pairs} == {row["said"] for row in rows}
    found = agreement_report(pairs, {"vocabulary": shapes_judge()}).figures["agreement"]["people, vocabulary"]
    assert found["vocabulary"] > 0
    assert found["agreement"] == 1
    counts = Counter(label for row in rows for _, label in row["labels"])
    assert counts == {label: sum(row[label] for row in rows) for label in counts}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["reference,said,object"], "has no column label"),
        (["reference,said,object,label"], "holds no descriptions"),
        (["reference,said,object,label", "a,b,dog,right"], "line 2: a label is TP, FP or FN of an object, got 'right'"),
        (["reference,said,object,label", "a,b,,TP"], "line 2: a label is"),
    ],
)
def test_tables_that_are_none(lines, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read_labels(write(tmp_path / "labels.csv", *lines))
    with pytest.raises(InputError, match="no such file"):
        read_labels(tmp_path / "gone.csv")
    (tmp_path / "latin.csv").write_bytes(b"\xe9\xff")
    with pytest.raises(InputError, match="no text in UTF-8"):
        read_labels(tmp_path / "latin.csv")


def test_a_caption_is_scored_with_its_picture(server, tmp_path):
    settings = {"attempts": 3, "timeout": 0.4, "pause": 0.01, "api_key": KEY, "base_url": server.url}
    judge = CaptionJudge(Endpoint("judge", **settings, cache=tmp_path))
    server.replies = ["nine", "9"]
    picture = Image.new("RGB", (900, 300), "red")
    assert judge.score(picture, "a red wall") == (9, 84)
    text, shown = server.asked[-1]["messages"][-1]["content"]
    assert '"a red wall"' in text["text"]
    data = shown["image_url"]["url"].removeprefix("data:image/png;base64,")
    with Image.open(io.BytesIO(base64.b64decode(data))) as sent:
        assert sent.size == (900, 300)  # the whole image, unshrunk
    assert judge.score(picture, "a red wall") == (9, 0)  # kept
    server.replies = [None] * 3
    with pytest.raises(Unanswered):
        judge.score(picture, "a blue wall")
    assert KEY not in "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())

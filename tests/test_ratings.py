"""Table A1 of arXiv 2411.17491: a judge against people who are asked single questions."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter

import pytest

from mllm_fast.core.errors import InputError
from mllm_fast.evaluation.judges.agreement import Labelled, labels_csv
from mllm_fast.evaluation.judges.ratings import Rating, questions, rating_page, ratings_report, read_ratings

PAIRS = [
    Labelled("a dog and a cat", "a dog and a car", Counter({("dog", "tp"): 1, ("cat", "fn"): 1, ("car", "fp"): 1})),
    Labelled("a dog and a cat", "", Counter({("dog", "fn"): 1, ("cat", "fn"): 1})),
]


def test_the_questions_that_labels_answer():
    """A matched object is in both texts, a missed one in the first, a made up one in the second; "" asks nothing."""
    first, second = "a dog and a cat", "a dog and a car"
    assert questions(PAIRS) == {
        (first, "dog"): True,
        (second, "dog"): True,
        (first, "cat"): True,
        (second, "cat"): False,
        (first, "car"): False,
        (second, "car"): True,
    }
    contradicted = [*PAIRS, Labelled(first, second, Counter({("cat", "tp"): 1}))]
    assert (second, "cat") not in questions(contradicted)


def test_the_papers_table():
    """Its 1,358 ratings that agree with their question's majority, one rating a question: 95.2, 96.5, 95.7 %."""
    counts = {(True, True): 798, (True, False): 18, (False, True): 40, (False, False): 502}
    pairs, ratings = [], []
    for (judge, people), number in counts.items():
        for i in range(number):
            text = f"{judge} {people} {i}"
            pairs.append(Labelled("", text, Counter({("dog", "tp" if judge else "fn"): 1})))
            ratings.append(Rating((text, "dog"), "a", people))
    figures = ratings_report(pairs, ratings).figures
    assert figures["kept"] == figures["ratings"] == 1358
    assert figures["true positive rate"] == pytest.approx(798 / 838)
    assert figures["true negative rate"] == pytest.approx(502 / 520)
    assert figures["accuracy"] == pytest.approx(1300 / 1358)
    assert figures["confusion"] == {
        "judge yes, people yes": 798,
        "judge yes, people no": 18,
        "judge no, people yes": 40,
        "judge no, people no": 502,
    }


def test_ratings_against_the_majority_are_dropped():
    first, second = "a dog and a cat", "a dog and a car"
    ratings = [
        *(
            Rating((first, "dog"), rater, mentioned)
            for rater, mentioned in zip("abc", (True, True, False), strict=True)
        ),
        *(Rating((second, "cat"), rater, said) for rater, said in zip("ab", (True, False), strict=True)),
        Rating((second, "car"), "a", False),
        Rating(("another text", "car"), "a", True),
    ]
    report = ratings_report(PAIRS, ratings)
    figures = report.figures
    assert (figures["ratings"], figures["kept"], figures["questions"], figures["unknown"]) == (6, 3, 3, 1)
    assert figures["agreement of the raters"] == pytest.approx(3 / 6)  # two of three, none of a tie, one of one
    assert figures["true positive rate"] == 1  # both kept ratings of the dog
    assert figures["true negative rate"] == 0  # the car, of which the judge says that it is mentioned
    assert figures["accuracy"] == pytest.approx(2 / 3)
    assert "left out" in report.says[1]


def page_questions(text):
    return json.loads(re.search(r"const questions = (.*);\n", text)[1])


def test_the_page_asks_all_and_tells_no_answer():
    evil = Labelled("</script><b>x</b>", 'say "cat", twice', Counter({("cat", "fp"): 1}))
    text = rating_page([*PAIRS, evil], seed=3)
    asked = page_questions(text)
    assert {(one["description"], one["object"]) for one in asked} == set(questions([*PAIRS, evil]))
    assert all(set(one) == {"description", "object"} for one in asked)
    assert text.count("</script>") == 1
    assert page_questions(rating_page([*PAIRS, evil], seed=3)) == asked
    assert page_questions(rating_page([*PAIRS, evil], 2, seed=3)) == asked[:2]
    assert not re.search(r"(src|href)\s*=\s*[\"']?http", text)
    with pytest.raises(InputError, match="no object"):
        rating_page([Labelled("a", "b", Counter())])


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("description,object,rater\na,dog,1\n", "no column answer"),
        ("description,object,rater,answer\na,dog,1,perhaps\n", "line 2: an answer is yes or no, got 'perhaps'"),
        ("description,object,rater,answer\na,dog,1,yes\na,the Dog,1,no\n", "line 3: 1 says both yes and no"),
        ("description,object,rater,answer\n", "no rating"),
        (None, "no such file"),
    ],
)
def test_ratings_that_cannot_be_read(tmp_path, text, why):
    if text is not None:
        (tmp_path / "r.csv").write_text(text)
    with pytest.raises(InputError, match=why):
        read_ratings([tmp_path / "r.csv"])


def test_the_command(run, tmp_path):
    """From a judge's labels to a page, and from the raters' files to the table."""
    labels = labels_csv((pair.reference, pair.said, list(pair.labels)) for pair in PAIRS)
    (tmp_path / "labels.csv").write_text(labels)
    code, _, err = run("eval", "judges", "--labels", tmp_path / "labels.csv", "--page", tmp_path / "rate.html")
    assert code == 0, err
    asked = page_questions((tmp_path / "rate.html").read_text())
    for rater in "ab":
        rows = io.StringIO()
        writer = csv.writer(rows)
        writer.writerow(["description", "object", "rater", "answer"])
        for one in asked:
            truth = one["object"] in one["description"]
            writer.writerow([one["description"], one["object"], rater, "yes" if truth else "no"])
        (tmp_path / f"{rater}.csv").write_text(rows.getvalue())
    files = [option for rater in "ab" for option in ("--ratings", tmp_path / f"{rater}.csv")]
    code, out, err = run(
        "eval", "judges", "--labels", tmp_path / "labels.csv", *files, "--out", tmp_path / "out", "--json"
    )
    assert code == 0, err
    figures = json.loads(out)["judges"]
    assert figures["accuracy"] == figures["agreement of the raters"] == 1.0
    assert figures["ratings"] == 12
    code, _, err = run("eval", "heads", "--page", tmp_path / "x.html")
    assert code == 2
    assert "--page" in err

"""The report: the least trustworthy answers, thresholds, and a page that opens anywhere."""

import base64
import hashlib
import html
import json
import re
import socket
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import matplotlib
import mlflow
import numpy as np
import openai
import pandas as pd
import pytest
from mlflow.entities import AssessmentSource

import tlm_tracing as tt
from tlm_tracing import cli
from tlm_tracing._report import _charts, _page, least_trustworthy, report
from tlm_tracing._report._thresholds import Curve
from tlm_tracing._report._truth import contains
from tlm_tracing.exceptions import ConfigurationError
from tlm_tracing.testing import FakeScorer

COLUMNS = [
    "trace_id",
    "span_id",
    "timestamp",
    "prompt",
    "response",
    "trust_score",
    "explanation",
    "status",
    "reason",
]
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)> & \"quoted\" 'text' $x_1$"
PERSON = AssessmentSource(source_type="HUMAN", source_id="me")


@pytest.fixture
def ask(sandbox):
    """Asks, is answered, and is scored; gives the trace's id."""

    def one(question, answer, score, explanation=None, model="gpt-4o"):
        sandbox.answer(question, answer)
        result = score if score is None else tt.Trust(score=score, explanation=explanation)
        scorer = FakeScorer(RuntimeError("no score") if result is None else result)
        client = tt.wrap_openai(openai.OpenAI(), scorer=scorer)
        message = {"role": "user", "content": question}
        completion = client.chat.completions.create(model=model, messages=[message])
        assert tt.flush(30)
        return tt.trust(completion).trace_id

    return one


def frame(scores, **columns):
    """What ``score_traces`` would return of answers with these scores."""
    count = len(scores)
    return pd.DataFrame(
        {
            "trace_id": [f"tr-{number:032x}" for number in range(count)],
            "span_id": "0123456789abcdef",
            "timestamp": pd.date_range("2026-11-01", periods=count, freq="h", tz="UTC"),
            "prompt": [f"Question {number}" for number in range(count)],
            "response": [f"Answer {number}" for number in range(count)],
            "trust_score": scores,
            "explanation": None,
            "status": ["unscored" if score != score else "scored" for score in scores],
            "reason": ["timeout" if score != score else None for score in scores],
            **columns,
        }
    )


class Page(HTMLParser):
    """What a browser finds in a page."""

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text("utf-8")
        self.tags = []
        self.texts = []
        self.links = []
        self.addresses = []
        self.scripts = []
        self.policy = ""
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append(tag)
        self.addresses += [
            value for key, value in attributes if key in ("src", "href", "action", "srcset")
        ]
        if tag == "a":
            self.links.append(given["href"])
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]
        assert not [key for key in given if key.startswith("on")]

    def handle_data(self, data):
        if self.lasttag == "script" and data.strip():
            self.scripts.append(data)
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def page(tmp_path, *arguments, **options):
    path = tmp_path / "report.html"
    report(*arguments, html=path, **options)
    return Page(path)


def test_the_least_trustworthy_come_first_as_they_were_scored(ask):
    """``least_trustworthy`` gives the lowest scores of what is stored, whole and with reasons."""
    long = "The answer is long. " * 200
    low = ask("Who?", long, 0.2, "It is made up.")
    ask("What?", "That.", 0.9)
    middle = ask("When?", "Then.", 0.5)
    found = least_trustworthy(2)
    assert list(found.columns) == COLUMNS
    assert list(found.trace_id) == [low, middle]
    assert list(found.trust_score) == [0.2, 0.5]
    assert found.prompt[0] == "Who?"
    assert found.response[0] == long
    assert found.explanation[0] == "It is made up."
    assert set(found.status) == {"scored"}
    assert str(found.timestamp.dtype).endswith("UTC]")
    span = mlflow.get_trace(low).search_spans(span_id=found.span_id[0])[0]
    assert span.name == "chat gpt-4o"


def test_each_call_of_a_trace_is_a_row(sandbox):
    """A trace with two calls has two rows, each with its own texts."""
    sandbox.answer("Who?", "He.")
    sandbox.answer("Why?", "Because.")
    with tt.trusted_span("both", scorer=FakeScorer(0.7, 0.3)):
        for question in ("Who?", "Why?"):
            openai.OpenAI().chat.completions.create(
                model="gpt-4o", messages=[{"role": "user", "content": question}]
            )
    assert tt.flush(30)
    found = least_trustworthy()
    assert list(found.prompt) == ["Why?", "Who?"]
    assert list(found.response) == ["Because.", "He."]
    assert found.trace_id.nunique() == 1
    assert found.span_id.nunique() == 2


def test_a_trace_with_tags_alone_is_a_row():
    """Scores that are kept as tags only are found, with what MLflow lists of the texts."""
    with mlflow.start_span("mine") as span:
        span.set_inputs("Who?")
        span.set_outputs("He.")
    for key, value in {"trust_score": "0.2500", "trust_status": "scored"}.items():
        mlflow.set_trace_tag(span.trace_id, key, value)
    found = least_trustworthy()
    assert list(found.trust_score) == [0.25]
    assert "Who?" in found.prompt[0]
    assert "He." in found.response[0]


def test_report_gives_the_same_rows_and_searches_like_mlflow(ask, experiment):
    """``report`` and ``least_trustworthy`` agree, and both take MLflow's filters and times."""
    low = ask("Who?", "He.", 0.2)
    high = ask("What?", "That.", 0.9)
    mlflow.set_trace_tag(high, "team", "blue")
    pd.testing.assert_frame_equal(report(), least_trustworthy())
    assert list(report(experiment_ids=[experiment], n=1).trace_id) == [low]
    assert list(report(filter_string="tag.team = 'blue'").trace_id) == [high]
    assert list(least_trustworthy(filter_string="tag.team = 'blue'").trace_id) == [high]
    assert len(report(since="1h")) == 2
    assert not len(report(until="1h"))


def test_the_page_has_all_of_it(ask, tmp_path):
    """Distribution, time, experiments and the worst answers are on the page."""
    trace_id = ask("Who wrote Faust?", "Schiller did.", 0.2, "Goethe did.")
    ask("What?", "That.", 0.9)
    ask("Why?", "Because.", None)
    found = page(tmp_path)
    for wanted in ("Who wrote Faust?", "Schiller did.", "Goethe did.", trace_id, "0.2000"):
        assert wanted in found.text
    for title in ("Distribution of scores", "Score over time", "By model", "By experiment"):
        assert title in found.text
    assert "gpt-4o-2024-08-06: median" in found.text
    assert "test_the_page_has_all_of_it" in found.text
    assert "1 without a score" in found.text
    assert "Choose a threshold" not in found.text


def test_the_page_needs_no_network_and_may_not_use_one(ask, tmp_path):
    """Nothing is loaded, a policy forbids it, and the one script is named by its hash."""
    ask("Who?", "He.", 0.2)
    mlflow.log_expectation(trace_id=ask("What?", "That.", 0.9), name="reference", value="That")
    mlflow.log_expectation(trace_id=ask("Where?", "Here.", 0.1), name="reference", value="There")
    found = page(tmp_path)
    assert [one for one in found.addresses if not one.startswith("#")] == []
    assert not {"img", "iframe", "object", "embed", "base", "form"} & set(found.tags)
    assert "http:" not in re.sub(r"xmlns\S+", "", found.source)
    assert "default-src 'none'" in found.policy
    (hashed,) = re.findall(r"script-src '(sha256-[^']+)'", found.policy)
    data, script = found.scripts
    assert json.loads(data)[50]["threshold"] == 0.5
    assert hashed == f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def test_the_page_follows_light_and_dark(tmp_path):
    """Charts have the page's colours by name, and the page has two sets of them."""
    found = page(tmp_path, frame([0.1, 0.6, 0.9]))
    charts = re.findall(r"<svg.*?</svg>", found.source, re.DOTALL)
    assert len(charts) == 2
    for chart in charts:
        assert not re.search(r"#[0-9a-f]{6}\b", chart)
        used = set(re.findall(r"var\(--([a-z]+)\)", chart))
        assert used
        for scheme in re.findall(r":root \{(.*?)\}", found.source, re.DOTALL):
            assert used <= set(re.findall(r"--([a-z]+):", scheme))
    assert "prefers-color-scheme: dark" in found.source


def test_charts_can_be_read_by_those_who_cannot_see_them(tmp_path):
    """Each chart has a title and a description in numbers, and ids are unique."""
    found = page(tmp_path, frame([0.1, 0.6, 0.9], experiment="one", model="gpt-4o"))
    charts = re.findall(r"<svg.*?</svg>", found.source, re.DOTALL)
    assert len(charts) == 4
    for chart in charts:
        root = ElementTree.fromstring(chart.replace("xlink:", ""))
        assert root.attrib["role"] == "img"
        title, told = root[0], root[1]
        assert title.attrib["id"] == root.attrib["aria-labelledby"]
        assert told.attrib["id"] == root.attrib["aria-describedby"]
        assert "3 answers" in told.text
        assert re.search(r"median .*0\.\d\d", told.text)
    ids = re.findall(r'\sid="([^"]+)"', found.source)
    assert len(ids) == len(set(ids))


def test_what_others_wrote_is_shown_and_never_run(tmp_path):
    """Markup in any text is text on the page."""
    names = ("trace_id", "prompt", "response", "explanation", "reference", "model", "experiment")
    found = page(tmp_path, frame([0.1, 0.9], **dict.fromkeys(names, HOSTILE)))
    plain = page(tmp_path, frame([0.1, 0.9], **dict.fromkeys(names, "words")))
    assert found.tags == plain.tags
    assert found.text.count("alert(1)") >= 2 * len(names)
    assert "<img" not in found.source
    assert "$x_1$" in found.text
    assert html.escape(HOSTILE)[:40] in found.source


def test_odd_texts_do_not_break_the_page(tmp_path):
    """Half a surrogate pair, control characters and letters that no font has are no problem."""
    odd = "\ud800 \x00\x01\x1b[31m 日本語 \U0001f9ff " + "long " * 200
    found = page(tmp_path, frame([0.1], prompt=odd, experiment=odd, model=odd, explanation=odd))
    assert "日本語" in found.text


@pytest.mark.parametrize(
    ("uri", "wanted"),
    [
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000/#"),
        ("https://me:secret@mlflow.example/team/?token=abc#x", "https://mlflow.example/team/#"),
        ("HTTP://Host:80/", "HTTP://Host:80/#"),
        ("sqlite:///mlflow.db", None),
        ("databricks", None),
        ("javascript://x", None),
    ],
)
def test_links_lead_into_mlflow_without_credentials(uri, wanted):
    """A trace is linked if MLflow is a server, and nothing secret is in the link."""
    path = "/experiments/7/traces?selectedEvaluationId=tr-1"
    assert _page.link(uri, "7", "tr-1") == (wanted and wanted + path)


def test_a_link_cannot_be_led_astray():
    """Ids from a frame stay in their places."""
    found = _page.link("http://host", '../x?"', '"><b>&x=1')
    assert found == (
        "http://host/#/experiments/..%2Fx%3F%22/traces?selectedEvaluationId=%22%3E%3Cb%3E%26x%3D1"
    )


@pytest.mark.parametrize(
    ("answer", "reference", "wanted"),
    [
        ("It was Michio Sugeno.", "michio  sugeno", True),
        ("It was Michio Sugeno.", "The Sugeno", True),
        ("It has 72 stations.", "7", False),
        ("About 1,234 of them.", "1234", True),
        ("It is 3.5 metres.", "35", False),
        ("It is 3.5.", "3.5", True),
        ("From 1914\u20131918.", "1914-1918", True),
        ("O'Brien\u2019s book", "O\u2019Brien's", True),
        ("法国的首都是巴黎。", "巴黎", True),
        ("STRASSE", "straße", True),
        ("anything", "The", None),
        ("anything", "...", None),
        ("[12 characters]", "Paris", None),
    ],
)
def test_an_answer_is_right_if_the_reference_is_in_it(answer, reference, wanted):
    """Whatever case, punctuation and articles, but whole words and numbers."""
    assert contains(answer, reference) is wanted


def test_expectations_and_feedback_say_what_is_right(ask, tmp_path):
    """A person's word counts more than an expectation's text; both feed the thresholds."""
    wrong = ask("Who?", "He did.", 0.1)
    mlflow.log_expectation(trace_id=wrong, name="expected_response", value="She")
    right = ask("What?", "That one.", 0.9)
    mlflow.log_expectation(trace_id=right, name="anything", value="that one")
    said = ask("Where?", "Over there.", 0.6)
    mlflow.log_expectation(trace_id=said, name="expected_response", value="here")
    mlflow.log_feedback(trace_id=said, name="correct", value=True, source=PERSON)
    flag = ask("When?", "Now.", 0.2)
    mlflow.log_expectation(trace_id=flag, name="is_correct", value=False)
    ask("Why?", "Because.", 0.3)
    machine = ask("How?", "Like this.", 0.4)
    mlflow.log_feedback(trace_id=machine, name="correct", value=False)
    found = page(tmp_path)
    assert "right for 4 of 6" in found.text
    assert "2 by a right answer in words" in found.text
    assert "1 by a person's feedback" in found.text
    assert "1 by an expectation or reference that says true or false" in found.text
    assert "Wrong are 2 (50%)" in found.text
    assert "Suggested is 0.4," in found.text
    assert "100% of the flagged are wrong, and 100% of the wrong are flagged" in found.text


def test_a_reference_may_be_far_down_in_a_long_answer(ask, tmp_path):
    """What MLflow's list cuts off counts, too."""
    known = ask("Who?", "Well, let me think. " * 100 + "It was Goethe.", 0.9)
    mlflow.log_expectation(trace_id=known, name="ground_truth", value="Goethe")
    wrong = ask("Why?", "Hm. " * 500, 0.1)
    mlflow.log_expectation(trace_id=wrong, name="ground_truth", value="Goethe")
    assert "right for 2 of 2" in (text := page(tmp_path).text)
    assert "Wrong are 1 (50%)" in text


def test_what_is_said_of_a_trace_is_held_against_its_lowest_score(sandbox, tmp_path):
    """A trace with several calls has one verdict, of the answer that it gave."""
    sandbox.answer("Who?", "He.")
    sandbox.answer("Why?", "Because.")

    @tt.trusted(scorer=FakeScorer(0.7, 0.3))
    def answer():
        for question in ("Who?", "Why?"):
            openai.OpenAI().chat.completions.create(
                model="gpt-4o", messages=[{"role": "user", "content": question}]
            )
        return "In the end: 42."

    answer()
    assert tt.flush(30)
    trace_id = least_trustworthy().trace_id[0]
    mlflow.log_expectation(trace_id=trace_id, name="reference", value="42")
    text = page(tmp_path).text
    assert "right for 1 of 2" in text
    assert "Wrong are 0 (0%)" in text
    assert "No threshold is suggested" in text


def test_what_is_said_of_a_call_is_held_against_its_own_score(sandbox, tmp_path):
    """An expectation on a call's span is about that call's answer, not about the trace's."""
    sandbox.answer("Who?", "He did.")
    sandbox.answer("Why?", "Because.")
    with tt.trusted_span("both", scorer=FakeScorer(0.7, 0.3)):
        for question in ("Who?", "Why?"):
            openai.OpenAI().chat.completions.create(
                model="gpt-4o", messages=[{"role": "user", "content": question}]
            )
    assert tt.flush(30)
    why, who = least_trustworthy().itertuples()
    for call, value in ((who, "he"), (why, "for fun")):
        mlflow.log_assessment(
            call.trace_id,
            mlflow.entities.Expectation(name="reference", value=value, span_id=call.span_id),
        )
    text = page(tmp_path).text
    assert "right for 2 of 2" in text
    assert "Wrong are 1 (50%)" in text
    assert "Suggested is 0.5," in text


def test_reference_names_the_expectation_that_is_meant(ask, tmp_path):
    """Of several expectations the named one counts."""
    trace_id = ask("Who?", "He did.", 0.1)
    mlflow.log_expectation(trace_id=trace_id, name="reference", value="She")
    mlflow.log_expectation(trace_id=trace_id, name="checked", value="He")
    assert "Wrong are 1" in page(tmp_path).text
    assert "Wrong are 0" in page(tmp_path, reference="checked").text


def test_a_frame_may_have_a_column_of_references(tmp_path):
    """References of all kinds: text, several texts, numbers, true or false, none."""
    references = ["answer 0", ["x", "Answer 1"], 2, False, None, float("nan")]
    scores = frame([0.8, 0.9, 0.7, 0.2, 0.5, 0.6], reference=references)
    text = page(tmp_path, scores).text
    assert "right for 4 of 6" in text
    assert "Wrong are 1 (25%)" in text
    renamed = scores.rename(columns={"reference": "truth"})
    assert "right for 4 of 6" in page(tmp_path, renamed, reference="truth").text
    assert "Choose a threshold" not in page(tmp_path, renamed).text


@pytest.mark.parametrize("is_left", [True, False])
def test_a_frame_merged_with_search_traces_works(ask, tmp_path, is_left):
    """Merging by trace id, in either direction, keeps our texts and brings expectations."""
    low = ask("Who?", "He did.", 0.1)
    mlflow.log_expectation(trace_id=low, name="expected_response", value="She")
    high = ask("What?", "That one.", 0.9)
    mlflow.log_expectation(trace_id=high, name="expected_response", value="that one")
    ours, theirs = least_trustworthy(), mlflow.search_traces()
    merged = ours.merge(theirs, on="trace_id") if is_left else theirs.merge(ours, on="trace_id")
    assert len(merged) == 2
    pd.testing.assert_frame_equal(report(merged), ours)
    text = page(tmp_path, merged).text
    assert "right for 2 of 2" in text
    assert "Wrong are 1 (50%)" in text


def test_a_frame_of_least_trustworthy_reports_on_itself(ask):
    """What one function gives, the other takes."""
    ask("Who?", "He did.", 0.1)
    ask("What?", "That.", 0.7)
    pd.testing.assert_frame_equal(report(least_trustworthy()), least_trustworthy())


def test_pandas_ways_to_say_nothing_are_understood(tmp_path):
    """NA, NaT, NaN and None are no text, no time and no score."""
    scores = frame([0.4, 0.5, 0.6], experiment=pd.array(["a", pd.NA, "a"], dtype="string"))
    scores["timestamp"] = [pd.NaT, None, pd.Timestamp("2026-11-01", tz="UTC")]
    scores["trust_score"] = pd.array([0.4, pd.NA, 0.6], dtype="Float64")
    found = report(scores)
    assert list(found.trust_score) == [0.4, 0.6]
    assert found.timestamp.isna().tolist() == [True, False]
    assert "NA" not in page(tmp_path, scores).text


def test_unscored_answers_are_counted_not_listed(tmp_path):
    """The page says how many have no score, and why."""
    scores = frame([0.4, float("nan"), float("nan"), 0.6])
    assert len(report(scores)) == 2
    text = page(tmp_path, scores).text
    assert "2 without a score" in text
    assert "2 timeout" in text


def test_a_curve_agrees_with_counting():
    """Precision, recall and the rest are what counting one by one gives, ties and all."""
    random = np.random.default_rng(7)
    for count in (1, 2, 5, 200):
        scores = random.integers(0, 21, count) / 20
        is_wrong = random.random(count) > scores
        curve = Curve(scores, is_wrong)
        for threshold in (0.0, 0.05, 0.33, 0.5, 1.0):
            point, flagged = curve.at(threshold), scores < threshold
            assert point.count == flagged.sum()
            assert point.flagged == flagged.mean()
            hit = (flagged & is_wrong).sum()
            assert point.precision == (hit / flagged.sum() if flagged.any() else None)
            assert point.recall == (hit / is_wrong.sum() if is_wrong.any() else None)
            kept = ~flagged
            assert point.missed == ((kept & is_wrong).sum() / kept.sum() if kept.any() else None)


def test_the_suggested_threshold_has_the_best_f1():
    """No other threshold does better, and its number is short."""
    random = np.random.default_rng(8)
    scores = random.beta(4, 2, 300)
    is_wrong = random.random(300) > scores + 0.2
    curve = Curve(scores, is_wrong)
    best = curve.suggested()
    assert best == curve.best_f1()
    thresholds = np.linspace(0, 1, 1001)
    assert best.f1 == max(curve.at(one).f1 for one in thresholds)
    assert len(f"{best.threshold:g}") <= 5
    split = curve.best_separation()
    right = ~is_wrong

    def separation(threshold):
        flagged = scores < threshold
        return flagged[is_wrong].mean() - flagged[right].mean()

    assert separation(split.threshold) == max(map(separation, thresholds))


def test_where_most_are_wrong_nearly_all_would_be_flagged():
    """Then the best F1 is no help, and what parts wrong from right best is suggested."""
    scores = np.linspace(0.1, 0.99, 100)
    is_wrong = np.arange(100) < 95
    is_wrong[[3, 99]] = False, True
    curve = Curve(scores, is_wrong)
    assert curve.best_f1().flagged > 0.9
    assert curve.suggested() == curve.best_separation()


@pytest.mark.parametrize("is_wrong", [[True, True], [False, False]])
def test_without_right_and_wrong_nothing_is_suggested(is_wrong):
    """There is nothing to choose between."""
    curve = Curve(np.array([0.2, 0.8]), np.array(is_wrong))
    assert curve.suggested() is None
    assert curve.ranking() is None


def test_ranking_is_the_area_under_the_curve():
    """How often of a wrong and a right answer the wrong one has the lower score; ties are half."""
    curve = Curve(np.array([0.1, 0.5, 0.5, 0.9]), np.array([1, 1, 0, 0]))
    assert curve.ranking() == (1 + 1 + 0.5 + 1) / 4


def test_a_suggestion_is_a_round_number():
    """Where many thresholds do the same, the one in their middle."""
    curve = Curve(np.array([0.21, 0.32, 0.88, 0.93]), np.array([1, 1, 0, 0]))
    assert curve.suggested().threshold == 0.6
    curve = Curve(np.array([0.9712, 0.9744, 0.9761]), np.array([1, 0, 0]))
    assert curve.suggested().threshold == 0.973


def test_your_threshold_is_marked(tmp_path):
    """It has a row of its own, and its count is among the large numbers."""
    scores = frame([0.2, 0.4, 0.6, 0.8], reference=[False, True, False, True])
    text = page(tmp_path, scores, threshold=0.65).text
    assert "Below 0.65 75% 3 answers" in text
    assert "0.65 yours 75% 67% 100%" in text


def test_matplotlib_is_left_as_it_was():
    """Settings of the user's neither change nor show."""
    scores = np.array([0.1, 0.9])
    with matplotlib.rc_context():
        plain = _charts.distribution(scores, scores[:0], None)
        matplotlib.rcParams.update({"text.usetex": True, "axes.facecolor": "red", "font.size": 40})
        before = dict(matplotlib.rcParams)
        again = _charts.distribution(scores, scores[:0], None)
        assert dict(matplotlib.rcParams) == before
    assert again == plain


def test_many_groups_are_summed_up():
    """The twelve largest are shown, the rest as one."""
    groups = {f"model {number}": np.array([0.5] * (20 - number)) for number in range(20)}
    chart = _charts.by_group("models", "By model", groups)
    assert "model 11:" in chart.description
    assert "model 12:" not in chart.description
    assert "8 others" in chart.description
    assert _charts.by_group("models", "By model", {None: np.array([0.5])}) is None


def test_a_store_without_scores_says_what_to_run(ask, tmp_path, capsys):
    """Neither the command nor the page is empty: they name the command that scores."""
    with mlflow.start_span("unseen"):
        pass
    assert list(report().columns) == COLUMNS
    assert "tlm-tracing score" in page(tmp_path).text
    assert cli.main(["report"]) == 0
    said = capsys.readouterr().out
    assert "There are no scores" in said
    assert "1 traces have none" in said
    assert "tlm-tracing score" in said


def test_an_experiment_without_scores_names_one_with_scores(ask, capsys):
    """Who looks in the wrong place is told the right one."""
    ask("Who?", "He.", 0.2)
    mlflow.set_experiment("nothing here")
    assert cli.main(["report"]) == 0
    said = capsys.readouterr().out
    assert "There are scores in" in said
    assert "--experiment" in said


def test_the_command_shows_a_table_and_writes_a_page(ask, tmp_path, capsys, monkeypatch):
    """``tlm-tracing report``: worst first, with trace ids, a summary, and a page if asked for."""
    monkeypatch.setenv("COLUMNS", "100")
    low = ask("Who [bold]was[/bold] it?", "He.", 0.2, "Nobody knows.")
    ask("What?", "That.", 0.9)
    path = tmp_path / "page.html"
    name = mlflow.get_experiment(mlflow.get_trace(low).info.experiment_id).name
    arguments = ["report", "--experiment", name, "--threshold", "0.5", "--html", str(path)]
    assert cli.main([*arguments, "--since", "24h", "-n", "5"]) == 0
    said = capsys.readouterr().out
    assert said.index("0.2000") < said.index("0.9000")
    for wanted in ("Who [bold]was[/bold] it?", "Nobody knows.", low, "1 (50%) are below 0.5"):
        assert wanted in said
    assert str(path) in said.replace("\n", "")
    assert low in Page(path).text


def test_the_command_speaks_json(ask, capsys):
    """One JSON object for programs, numbers as numbers and nothing as null."""
    low = ask("Who?", "He.", 0.2)
    ask("Why?", "Because.", None)
    mlflow.log_expectation(trace_id=low, name="reference", value="She")
    mlflow.log_expectation(trace_id=ask("What?", "That.", 0.9), name="reference", value="that")
    assert cli.main(["report", "--json", "--threshold", "0.5"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["scored"], found["unscored"], found["never_tried"]) == (2, 1, 0)
    assert found["below_threshold"] == 1
    assert found["at_threshold"]["precision"] == found["suggested"]["recall"] == 1
    worst = found["worst"][0]
    assert list(worst) == COLUMNS
    assert worst["trace_id"] == low
    assert worst["trust_score"] == 0.2
    assert worst["reason"] is None
    assert worst["timestamp"].endswith("+00:00")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--experiment", "no such"], "no such"),
        (["--since", "yesterday-ish"], "since"),
        (["--threshold", "70"], "threshold must be a score in [0, 1]"),
        (["-n", "0"], "n must be 1 or more"),
        (["--filter", "nonsense here"], "filter"),
        (["--html", "no/such/folder/page.html"], "no/such/folder"),
    ],
)
def test_the_command_says_what_is_wrong(arguments, wanted, capsys):
    """A mistake gives one line and the status 2."""
    assert cli.main(["report", *arguments]) == 2
    said = capsys.readouterr()
    assert wanted in said.err
    assert "Traceback" not in said.err


def test_without_a_server_the_command_says_so_soon(capsys):
    """MLflow would try for minutes."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        before = mlflow.get_tracking_uri()
        try:
            assert cli.main(["report", "--tracking-uri", uri, "--experiment", "any"]) == 2
        finally:
            mlflow.set_tracking_uri(before)
    assert f"MLflow does not answer at {uri}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"scores": frame([0.5]).drop(columns="trust_score")}, "trust_score"),
        ({"scores": frame([0.5]), "reference": "truth"}, "truth"),
        ({"scores": frame([0.5]), "since": "24h"}, "not both"),
        ({"scores": frame([0.5]), "threshold": 7}, "threshold"),
        ({"scores": frame([0.5]), "n": 0}, "n must be"),
    ],
)
def test_wrong_arguments_are_refused(options, wanted):
    """The message names what is wrong."""
    with pytest.raises(ConfigurationError, match=wanted):
        report(**options)


def test_importing_the_report_is_light():
    """Neither pandas nor matplotlib nor MLflow is imported before it is needed."""
    code = (
        "import sys, tlm_tracing._report;"
        "print({'pandas', 'numpy', 'matplotlib', 'mlflow', 'jinja2'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"

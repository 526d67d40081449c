"""Case files: what they may hold, that nothing is lost on the way, and where a mistake is said to stand."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from dualtrace.cases.files import find_cases, read_case_text, read_cases, write_case
from dualtrace.cases.targets import fill_case, parse_values, used_names
from dualtrace.compare.gates import GatePolicy
from dualtrace.compare.tolerance import PROFILES, Tolerance, request_tolerance
from dualtrace.library import Case, SideSpec
from dualtrace.masks.json_form import parse_json as parse_mask
from dualtrace.masks.json_form import to_json as mask_to_json
from dualtrace.masks.spec import Alignment, CharRange, Named, SegmentName, TokenRange
from dualtrace.problems import InvalidArgument, NotFound, Problem, Reason
from dualtrace.questions.asked import PLAIN, Input, MaskedForwardQuestion, RollingQuestion, ScoreQuestion, Variant
from dualtrace.views import BASE, Noise, finetuned, null, scaled
from tests.support import strategies as known
from tests.support.strategies import same

SMALL = """\
name: small
tags: [smoke]
left: "fake:"
right: backend:other
question:
  rolling:
    inputs: ["The capital of France is Paris."]
"""
MASKS = [
    None,
    parse_mask({"base": {"causal": {}}}),
    parse_mask(mask_to_json(parse_mask({"base": {"array": {"matrix": [[1, 0], [1, 1]]}}}))),  # its note is no identity
    parse_mask(
        {
            "base": {"all": [{"causal": {}}, {"not": {"chunked": {"size": 4}}}]},
            "edges": [{"queries": {"segment": "completion"}, "keys": {"tokens": [0, 2]}, "layers": [0], "heads": [1]}],
            "empty_row": "SELF",
            "replace_native": True,
        }
    ),
]
SPANS = st.sampled_from([TokenRange(0, 3), Named(SegmentName("query")), CharRange(1, 2, Alignment.OVERLAP)])
FLAGS = st.booleans()
NUMBERS = st.floats(0, 1e6)
NAMES = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9._-]{0,12}\Z")
VIEWS = st.sampled_from(
    [BASE, finetuned("no"), scaled("a b", -1.25), null("x", Noise(-3, 0.1, 2.5, variance_faithful=True))]
)
SIDES = st.builds(
    SideSpec, known.TEXTS.filter(bool), st.builds(Variant, VIEWS, st.sampled_from(MASKS), allow_leak=FLAGS)
)
MASKED_QUESTIONS = st.builds(
    MaskedForwardQuestion,
    input=known.INPUTS,
    variants=st.just(PLAIN),
    segments=st.just(()) | st.just(((SegmentName("query"), (0, 2)), (SegmentName("item"), (2, 5)))),
    reads=st.lists(SPANS, max_size=2).map(tuple),
    prefix=known.PREFIXES,
    top_k=known.INT32,
    kl_base_masked=FLAGS,
    kl_masked_base=FLAGS,
    deterministic=FLAGS,
)
QUESTIONS: st.SearchStrategy[Any] = st.one_of(
    known.LOGPROB_QUESTIONS,
    known.ROLLING_QUESTIONS,
    known.NEXT_TOKEN_QUESTIONS,
    known.score_questions().filter(lambda one: one.temperature is None or abs(one.temperature) < 1e300),
    MASKED_QUESTIONS,
).map(lambda question: dataclasses.replace(question, variants=PLAIN))
TOLERANCES = st.one_of(
    st.none(),
    st.sampled_from([profile.tolerance for profile in PROFILES]),
    st.builds(request_tolerance, NUMBERS, NUMBERS),
    st.builds(Tolerance, known.TEXTS, NUMBERS, NUMBERS, known.TEXTS),
)
POLICIES = st.just(GatePolicy()) | st.builds(
    GatePolicy, st.integers(0, 9), NUMBERS, NUMBERS, NUMBERS, st.just(3), FLAGS
)
CASES = st.builds(
    Case,
    name=NAMES,
    question=QUESTIONS,
    left=SIDES,
    right=SIDES,
    tolerance=TOLERANCES,
    policy=POLICIES,
    tags=st.lists(NAMES, max_size=2, unique=True).map(tuple),
    description=known.TEXTS,
)


def read_one(text: str, file: str = "some.yaml") -> Case:
    ((case, _line),) = read_case_text(text, file)
    return case


def refusal(text: str, file: str = "some.yaml") -> Problem:
    with pytest.raises(Problem) as caught:
        read_case_text(text, file)
    return caught.value


def changed(old: str, new: str) -> str:
    assert old in SMALL
    return SMALL.replace(old, new)


@given(CASES)
def test_a_case_that_was_written_is_read_back_to_the_last_bit(case: Case) -> None:
    assert same(read_one(write_case(case)), case)


@given(CASES)
def test_the_json_twin_of_a_file_holds_the_same_case(case: Case) -> None:
    twin = json.dumps(yaml.safe_load(write_case(dataclasses.replace(case, tolerance=None))))
    assert same(read_one(twin, "some.json"), dataclasses.replace(case, tolerance=None))


@given(
    st.text(alphabet=st.characters(exclude_categories=["Cs"]) | st.sampled_from(" \n\t\r:#-'\"|>\\\x85\u2028\ufeff"))
)
def test_any_text_survives_the_file(text: str) -> None:
    case = Case("text", RollingQuestion((Input(text=text),)), SideSpec("fake:"), SideSpec("fake:"))
    assert same(read_one(write_case(case)), case)


@pytest.mark.parametrize("line_break", ["\r", "\x85", "\u2028", "\u2029"])
def test_no_line_break_becomes_another(line_break: str) -> None:
    side = SideSpec("fake:")
    case = Case("breaks", RollingQuestion((Input(text=f"a\nb{line_break}c"),)), side, side)
    assert same(read_one(write_case(case)), case)


@pytest.mark.parametrize(
    "word", ["no", "on", "null", "~", "1e-4", "1_000", "0x1f", "12:30", "2026-01-01", "<<", "=", ".5"]
)
def test_a_word_that_some_reader_takes_for_a_number_stays_text(word: str) -> None:
    case = Case("word", RollingQuestion((Input(text=word),)), SideSpec("fake:"), SideSpec("fake:"), description=word)
    written = write_case(case)
    assert same(read_one(written), case)
    assert yaml.safe_load(written)["description"] == word


def test_what_holds_its_default_is_not_written() -> None:
    assert set(yaml.safe_load(write_case(read_one(SMALL)))) == {"name", "tags", "left", "right", "question"}


def test_numbers_are_read_by_the_rules_of_yaml_1_2() -> None:
    tolerance = read_one(SMALL + "tolerance: {abs: 1e-4, rel: 0}").tolerance
    assert tolerance == request_tolerance(1e-4, 0.0)


def test_a_profile_is_named_by_its_name() -> None:
    strict = PROFILES[0].tolerance
    assert read_one(SMALL + f"tolerance: {strict.name}").tolerance == strict


def test_a_list_of_numbers_is_ids_and_text_is_text() -> None:
    question = read_one(changed('["The capital of France is Paris."]', '[[1, 2], "1, 2", []]')).question
    assert isinstance(question, RollingQuestion)
    assert [None if one.ids is None else one.ids.tolist() for one in question.inputs] == [[1, 2], None, []]


def test_several_cases_stand_in_one_file() -> None:
    cases = [dataclasses.replace(read_one(SMALL), name=name) for name in ("a", "b")]
    found = read_case_text("---\n".join(map(write_case, cases)), "some.yaml")
    assert [case.name for case, _ in found] == ["a", "b"]
    listed = json.dumps({"cases": [yaml.safe_load(write_case(case)) for case in cases]})
    assert [case.name for case, _ in read_case_text(listed, "some.json")] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "line", "reason", "said"),
    [
        (SMALL + "tollerance: 3", 8, Reason.UNKNOWN_FIELD, "did you mean tolerance?"),
        (SMALL + "name: again", 8, Reason.DUPLICATE, "first in line 1"),
        (changed("rolling", "roling"), 6, Reason.UNKNOWN_FIELD, "logprob, rolling, next_token, score, masked_forward"),
        (changed("name: small\n", ""), 1, Reason.MISSING, "lacks name"),
        (changed("name: small", "name: a/b"), 1, Reason.MALFORMED, "is no name"),
        (changed("name: small", "name: 3"), 1, Reason.MALFORMED, "put it in quotes"),
        (changed("[smoke]", "[smoke, smoke]"), 1, Reason.DUPLICATE, "tag twice"),
        (changed('left: "fake:"', "left: {view: base}"), 3, Reason.MISSING, "lacks target"),
        (changed('left: "fake:"', 'left: {target: "fake:", view: tuned}'), 3, Reason.MALFORMED, "finetuned:NAME"),
        (changed('"fake:"', '{target: "fake:", mask: {base: {wide: {}}}}'), 3, Reason.UNKNOWN_FIELD, "sliding"),
        (SMALL + "tolerance: {abs: -1, rel: 0}", 8, Reason.OUT_OF_RANGE, "0 or above"),
        (SMALL + "tolerance: {abs: .inf, rel: 0}", 8, Reason.NOT_FINITE, ".inf"),
        (SMALL + "tolerance: tight", 8, Reason.UNKNOWN_ENUM_VALUE, PROFILES[0].tolerance.name),
        (SMALL + "gates: {max_tokens: 1}", 8, Reason.UNKNOWN_FIELD, "max_token_mismatches"),
        (SMALL + "gates:\n  latency_required: 1", 9, Reason.MALFORMED, "true or false"),
        (changed("inputs:", "top_k: no\n    inputs:"), 7, Reason.MALFORMED, "a whole number"),
        (changed('["The capital of France is Paris."]', "[[1, 5000000000]]"), 7, Reason.OUT_OF_RANGE, "32 bits"),
        (changed("name: small", "name: !!python/name:os.system x"), 1, Reason.MALFORMED, "tag"),
        (changed("[smoke]", "&tags [smoke]"), 2, Reason.MALFORMED, "anchors"),
        (changed("[smoke]", "[smoke"), 3, Reason.MALFORMED, "not valid YAML"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_line_and_what_is_allowed(text: str, line: int, reason: Reason, said: str) -> None:
    problem = refusal(text)
    assert (problem.detail.field, problem.reason) == (f"some.yaml:{line}", reason)
    assert said in str(problem)


@pytest.mark.parametrize(
    ("text", "where", "reason"),
    [
        ('{"name": "a",\n "nam": 1}', "some.json:2", Reason.UNKNOWN_FIELD),
        ('{"name": "a",\n\n "name": "b"}', "some.json:3", Reason.DUPLICATE),
        ('{"name": NaN}', "some.json", Reason.NOT_FINITE),
        ('{"name": "a"', "some.json", Reason.MALFORMED),
        (json.dumps({**yaml.safe_load(SMALL), "description": "\ud800"}), "some.json:1", Reason.INVALID_TEXT),
        ("[" * 100 + "]" * 100, "some.json:1", Reason.NESTED_TOO_DEEP),
    ],
)
def test_a_mistake_in_json_is_found_as_in_yaml(text: str, where: str, reason: Reason) -> None:
    problem = refusal(text, "some.json")
    assert (problem.detail.field, problem.reason) == (where, reason)


@pytest.mark.parametrize("text", ["", "---\n---\n", "cases: []"])
def test_a_file_without_a_case_is_refused(text: str) -> None:
    assert refusal(text).reason is Reason.EMPTY


@given(st.text(max_size=60) | st.binary(max_size=60).map(lambda data: data.decode("latin-1")))
def test_no_text_breaks_the_reader(text: str) -> None:
    for file in ("some.yaml", "some.json"):
        with pytest.raises(InvalidArgument):  # no such text is a case
            read_case_text(text, file)


def test_a_folder_is_read_with_all_below_it_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "b.yaml").write_text(SMALL)
    (tmp_path / "below" / "a.yml").write_text(changed("small", "other"))
    (tmp_path / "README.md").write_text("not a case")
    assert [case.name for case in read_cases(tmp_path)] == ["small", "other"]


def test_a_name_that_stands_in_two_files_is_refused_with_both_places(tmp_path: Path) -> None:
    for name in ("a.yaml", "b.yaml"):
        (tmp_path / name).write_text(SMALL)
    with pytest.raises(InvalidArgument) as caught:
        read_cases(tmp_path)
    assert caught.value.reason is Reason.DUPLICATE
    assert str(tmp_path / "a.yaml:1") in str(caught.value)
    assert str(tmp_path / "b.yaml:1") in str(caught.value)


def test_a_file_that_is_named_twice_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(SMALL)
    assert len(find_cases([tmp_path, tmp_path / "a.yaml"])) == 1


@pytest.mark.parametrize("name", ["nowhere.yaml", "."])
def test_where_no_case_file_is_nothing_is_found(tmp_path: Path, name: str) -> None:
    with pytest.raises(NotFound):
        read_cases(tmp_path / name)


def test_bytes_that_are_no_utf8_are_refused_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(SMALL.encode() + b"description: \xff\n")
    with pytest.raises(InvalidArgument) as caught:
        read_cases(tmp_path)
    assert caught.value.detail.field == f"{tmp_path / 'a.yaml'}:8"


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("torch:${MODEL}", "torch:/models/x"),
        ("torch:${PART}/y", "torch:/repo/z/y"),
        ("torch:model", "torch:/repo/model"),
        ("torch:/abs", "torch:/abs"),
        ("reference:../model", "reference:/repo/../model"),
        ("fake:seed=1", "fake:seed=1"),
        ("backend:${PART}", "backend:z"),
        ("grpc://host:1", "grpc://host:1"),
        ("saved.json", "/repo/saved.json"),
        ("torch:a$$b", "torch:/repo/a$b"),
    ],
)
def test_a_target_is_meant_from_where_its_file_stands(written: str, meant: str) -> None:
    case = dataclasses.replace(read_one(SMALL), left=SideSpec(written))
    assert fill_case(case, {"MODEL": "/models/x", "PART": "z"}, Path("/repo")).left.target == meant


@pytest.mark.parametrize(
    ("written", "said"),
    [("torch:${NONE}", "--set NONE=VALUE"), ("torch:$NONE", "write ${NAME}"), ("torch:${}", "${NAME}")],
)
def test_a_variable_without_a_value_is_refused_by_name(written: str, said: str) -> None:
    case = dataclasses.replace(read_one(SMALL), right=SideSpec(written))
    with pytest.raises(InvalidArgument) as caught:
        fill_case(case, {}, Path())
    assert said in str(caught.value)
    assert caught.value.detail.field == "small.right"


def test_used_names_are_those_of_both_sides_once() -> None:
    case = dataclasses.replace(read_one(SMALL), left=SideSpec("torch:${A}/${B}"), right=SideSpec("jax:${A}"))
    assert used_names(case) == ("A", "B")


@pytest.mark.parametrize("text", ["A", "=x", "a b=c", "A=1"])
def test_what_is_no_assignment_or_stands_twice_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_values(["A=0", text])


def test_a_score_question_keeps_its_labels_apart() -> None:
    text = changed("rolling:", "score:").replace("inputs:", "query: q\n    item_labels: [[1], [2, 3]]\n    items:")
    question = read_one(text).question
    assert isinstance(question, ScoreQuestion)
    assert (question.labels, question.item_labels) == (None, ((1,), (2, 3)))


def test_the_examples_are_cases() -> None:
    assert len(read_cases(Path(__file__).parents[2] / "examples" / "cases")) >= 3


def test_the_page_about_cases_shows_one_that_can_be_read() -> None:
    page = (Path(__file__).parents[2] / "docs" / "cases.md").read_text(encoding="utf-8")
    shown = [block.split("```")[0] for block in page.split("```yaml\n")[1:]]
    assert [case.name for text in shown for case, _ in read_case_text(text, "docs/cases.md.yaml")] == [
        "capitals",
        "a",
        "b",
    ]

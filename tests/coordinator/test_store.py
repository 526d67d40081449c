"""The store's runs and comparisons: kept whole, read back as they were, listed in pages."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
from sqlalchemy import event

from coordinator.store import JobEnd, Store, default_data_folder, new_run_id
from coordinator.store.ids import check_id
from dualtrace.compare.report import Verdict, report_to_text
from dualtrace.library import JobState
from dualtrace.problems import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound, Reason, Unavailable
from dualtrace.runs.kept import record_to_text
from tests.support.stored import make_comparison, make_full_record, make_record, make_run

MISSING = "run-" + "0" * 26


@pytest_asyncio.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await Store.open(tmp_path / "data")
    yield opened
    await opened.close()


async def add_runs(store: Store, count: int, target: str = "backend:a") -> list[str]:
    records = [make_record(target) for _ in range(count)]
    for record in records:
        await store.add_run(record)
    return [record.run_id for record in records]


async def list_ids(store: Store, page_size: int, target: str = "") -> list[list[str]]:
    """The ids of every page."""
    pages: list[list[str]] = []
    token = ""
    while not pages or token:
        page = await store.list_runs(page_size, token, target=target)
        pages.append([entry.run_id for entry in page.entries])
        token = page.next_page_token
    return pages


# Ids


def test_ids_sort_by_the_time_of_making_even_within_one_millisecond() -> None:
    made = [new_run_id() for _ in range(2000)]
    assert made == sorted(set(made))


def test_an_id_that_is_made_is_an_id() -> None:
    made = new_run_id()
    assert check_id(made, "run", "run_id") == made


def test_ids_go_on_upwards_when_the_clock_steps_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = new_run_id()
    monkeypatch.setattr(time, "time", lambda: 1_000_000.0)
    assert new_run_id() > before


# Where


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"DUALTRACE_DATA": "/d", "XDG_DATA_HOME": "/x"}, Path("/d")),
        ({"XDG_DATA_HOME": "/x"}, Path("/x/dualtrace")),
        ({}, Path.home() / ".local/share/dualtrace"),
    ],
)
def test_the_data_folder_is_the_users_unless_told_otherwise(environment: dict[str, str], folder: Path) -> None:
    assert default_data_folder(environment) == folder


# Runs


async def test_a_run_comes_back_as_it_was(store: Store) -> None:
    record = make_full_record()
    await store.add_run(record)
    assert record_to_text(await store.get_run(record.run_id)) == record_to_text(record)


async def test_the_text_of_a_run_is_kept_byte_for_byte(store: Store) -> None:
    record = make_record(text="naïve \ud83d")
    await store.add_run(record)
    assert await store.get_run_text(record.run_id) == record_to_text(record)


async def test_what_was_kept_is_there_after_a_restart(tmp_path: Path) -> None:
    record = make_record()
    first = await Store.open(tmp_path)
    await first.add_run(record)
    await first.close()
    second = await Store.open(tmp_path)
    found = await second.get_run(record.run_id)
    await second.close()
    assert found.run_id == record.run_id


async def test_a_run_is_stored_once(store: Store) -> None:
    record = make_record()
    await store.add_run(record)
    with pytest.raises(AlreadyExists, match=record.run_id):
        await store.add_run(replace(record, target="backend:other"))
    assert (await store.get_run(record.run_id)).target == "backend:a"


async def test_an_unknown_run_is_not_found(store: Store) -> None:
    with pytest.raises(NotFound, match=MISSING):
        await store.get_run(MISSING)


async def test_a_question_with_a_lone_surrogate_is_refused(store: Store) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await store.list_runs(target="\ud83d")
    assert caught.value.reason is Reason.INVALID_TEXT


@pytest.mark.parametrize("run_id", ["", "run-1", "cmp-" + "0" * 26, "run-" + "z" * 26, MISSING + "\n"])
async def test_a_run_id_that_is_none_of_ours_is_refused(store: Store, run_id: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await store.add_run(make_record(run_id=run_id))
    assert caught.value.detail.field == "run_id"


@pytest.mark.parametrize("target", ["\ud83d", "a\0b"])
async def test_a_target_that_no_column_can_hold_is_refused(store: Store, target: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await store.add_run(make_record(target))
    assert (caught.value.reason, caught.value.detail.field) == (Reason.INVALID_TEXT, "target")


async def test_a_run_that_names_an_artifact_that_is_not_there_is_refused(store: Store) -> None:
    record = make_record(raw_response_ref="sha256:" + "0" * 64)
    with pytest.raises(FailedPrecondition) as caught:
        await store.add_run(record)
    assert caught.value.detail.field == "raw_response_ref"


async def test_a_summary_says_what_a_list_shows(store: Store) -> None:
    record = replace(make_record("backend:b", synthetic=True), run=make_run("backend:b", complete=False))
    await store.add_run(record)
    (found,) = (await store.list_runs()).entries
    assert (found.run_id, found.target, found.model_id, found.framework, found.question_kind) == (
        record.run_id, "backend:b", "m", "reference", "ROLLING_LOGPROB"
    )  # fmt: skip
    assert (found.created, found.identity, found.complete, found.synthetic) == (
        record.run.created, record.run.identity, False, True
    )  # fmt: skip


# Pages


async def test_an_empty_list_is_one_empty_page(store: Store) -> None:
    assert await list_ids(store, 10) == [[]]


async def test_runs_are_listed_newest_first(store: Store) -> None:
    made = await add_runs(store, 3)
    assert await list_ids(store, 10) == [made[::-1]]


@pytest.mark.parametrize(("size", "lengths"), [(1, [1] * 6), (2, [2, 2, 2]), (4, [4, 2]), (6, [6]), (1000, [6])])
async def test_pages_hold_every_run_once(store: Store, size: int, lengths: list[int]) -> None:
    made = await add_runs(store, 6)
    pages = await list_ids(store, size)
    assert [len(page) for page in pages] == lengths
    assert [one for page in pages for one in page] == made[::-1]


async def test_a_run_added_while_pages_are_turned_moves_nothing(store: Store) -> None:
    made = await add_runs(store, 4)
    first = await store.list_runs(2)
    await add_runs(store, 1)
    second = await store.list_runs(2, first.next_page_token)
    assert [entry.run_id for entry in second.entries] == [made[1], made[0]]


async def test_a_filter_holds_on_every_page(store: Store) -> None:
    wanted = []
    for _ in range(3):
        wanted += await add_runs(store, 1, "backend:wanted")
        await add_runs(store, 1, "backend:other")
    assert await list_ids(store, 2, "backend:wanted") == [[wanted[2], wanted[1]], [wanted[0]]]


async def test_runs_are_found_by_identity(store: Store) -> None:
    record = make_record(text="another text")
    await add_runs(store, 2)
    await store.add_run(record)
    found = await store.list_runs(identity=record.run.identity)
    assert [entry.run_id for entry in found.entries] == [record.run_id]


@pytest.mark.parametrize("size", [0, -1, 1001])
async def test_a_page_size_out_of_range_is_refused(store: Store, size: int) -> None:
    with pytest.raises(InvalidArgument, match="1 to 1000") as caught:
        await store.list_runs(size)
    assert caught.value.detail.field == "page_size"


@pytest.mark.parametrize("token", ["x", "!!", "AAAA", "A" * 50, "é", "\ud83d", "A" * 5000])
async def test_a_made_up_page_token_is_refused(store: Store, token: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await store.list_runs(10, token)
    assert (caught.value.reason, caught.value.detail.field) == (Reason.MALFORMED, "page_token")


async def test_a_page_token_of_other_filters_is_refused(store: Store) -> None:
    await add_runs(store, 3)
    token = (await store.list_runs(1)).next_page_token
    with pytest.raises(InvalidArgument, match="page_token"):
        await store.list_runs(1, token, target="backend:a")


async def test_a_page_token_of_another_list_is_refused(store: Store) -> None:
    await add_runs(store, 2)
    token = (await store.list_runs(1)).next_page_token
    with pytest.raises(InvalidArgument, match="page_token"):
        await store.list_comparisons(1, token)


async def test_a_page_token_of_another_store_is_refused(store: Store, tmp_path: Path) -> None:
    await add_runs(store, 2)
    token = (await store.list_runs(1)).next_page_token
    other = await Store.open(tmp_path / "other")
    try:
        with pytest.raises(InvalidArgument, match="page_token"):
            await other.list_runs(1, token)
    finally:
        await other.close()


async def test_a_page_token_survives_a_restart(tmp_path: Path) -> None:
    first = await Store.open(tmp_path)
    made = await add_runs(first, 2)
    token = (await first.list_runs(1)).next_page_token
    await first.close()
    second = await Store.open(tmp_path)
    page = await second.list_runs(1, token)
    await second.close()
    assert [entry.run_id for entry in page.entries] == [made[0]]


async def test_a_list_does_not_load_the_documents(store: Store) -> None:
    statements: list[str] = []
    engine = store._database._readers.sync_engine
    event.listen(engine, "before_cursor_execute", lambda _c, _u, statement, *_: statements.append(statement))
    await store.list_runs()
    await store.list_comparisons()
    asked = [statement for statement in statements if "FROM" in statement]
    assert (len(asked), [statement for statement in asked if "document" in statement]) == (2, [])


# Comparisons


async def test_a_comparison_comes_back_as_it_was(store: Store) -> None:
    left, right = await add_runs(store, 2)
    record = make_comparison(left, right, "smoke")
    await store.add_comparison(record)
    found = await store.get_comparison(record.comparison_id)
    assert (found.left_run_id, found.right_run_id, found.case) == (left, right, "smoke")
    assert report_to_text(found.report) == report_to_text(record.report)


async def test_a_given_report_text_is_kept_byte_for_byte(store: Store) -> None:
    record = make_comparison()
    text = report_to_text(record.report).replace(",", ", ")
    await store.add_comparison(record, text)
    assert await store.get_comparison_text(record.comparison_id) == text


async def test_a_side_that_failed_has_no_run(store: Store) -> None:
    record = make_comparison()
    await store.add_comparison(record)
    assert (await store.get_comparison(record.comparison_id)).left_run_id == ""


async def test_a_comparison_of_a_run_that_is_not_there_is_refused_whole(store: Store) -> None:
    with pytest.raises(NotFound) as caught:
        await store.add_comparison(make_comparison("", MISSING))
    assert caught.value.detail.field == "right_run_id"
    assert (await store.list_comparisons()).entries == ()


async def test_a_comparison_is_kept_with_its_runs_and_the_end_of_its_job(store: Store) -> None:
    left, right = make_record(), make_record()
    job, _ = await store.start_job("request-1", "work")
    record = make_comparison(left.run_id, right.run_id)
    await store.add_comparison(record, None, (left, right), JobEnd(job.job_id, JobState.DONE, "verdict ERROR"))
    (event,) = await store.job_events(job.job_id)
    assert (event.job.state, event.job.comparison_id, event.message) == (
        JobState.DONE, record.comparison_id, "verdict ERROR"
    )  # fmt: skip
    assert await list_ids(store, 10) == [[right.run_id, left.run_id]]


async def test_a_comparison_one_of_whose_runs_cannot_be_kept_leaves_nothing(store: Store) -> None:
    left, right = make_record(), make_record()
    await store.add_run(right)
    with pytest.raises(AlreadyExists, match=right.run_id):
        await store.add_comparison(make_comparison(left.run_id, right.run_id), None, (left, right))
    assert await list_ids(store, 10) == [[right.run_id]]


async def test_a_job_that_has_ended_takes_no_results_any_more(store: Store) -> None:
    job, _ = await store.start_job("request-1", "work")
    await store.add_job_event(job.job_id, JobState.CANCELLED)
    with pytest.raises(FailedPrecondition, match="has ended"):
        await store.add_run(make_record(), JobEnd(job.job_id, JobState.DONE, "done"))
    assert (await store.list_runs()).entries == ()


async def test_a_comparison_is_stored_once(store: Store) -> None:
    record = make_comparison()
    await store.add_comparison(record)
    with pytest.raises(AlreadyExists, match=record.comparison_id):
        await store.add_comparison(record)


async def test_comparisons_are_found_by_case_and_verdict(store: Store) -> None:
    for case, verdict in [("a", Verdict.PASS), ("a", Verdict.FAIL), ("b", Verdict.FAIL), ("", Verdict.FAIL)]:
        await store.add_comparison(make_comparison(case=case, verdict=verdict))
    found = await store.list_comparisons(case="a", verdict=Verdict.FAIL)
    assert [(entry.case, entry.verdict) for entry in found.entries] == [("a", Verdict.FAIL)]


# One writer, many readers


async def test_a_hundred_runs_added_at_once_are_all_there(store: Store) -> None:
    records = [make_record() for _ in range(100)]
    await asyncio.gather(*(store.add_run(record) for record in records))
    assert await list_ids(store, 1000) == [[record.run_id for record in reversed(records)]]


async def test_a_caller_that_leaves_in_the_middle_harms_nobody(store: Store) -> None:
    records = [make_record() for _ in range(30)]
    tasks = [asyncio.ensure_future(store.add_run(record)) for record in records]
    reads = [asyncio.ensure_future(store.list_runs()) for _ in range(20)]
    await asyncio.sleep(0.02)
    for task in [*tasks[::2], *reads[::2]]:
        task.cancel()
    await asyncio.gather(*tasks, *reads, return_exceptions=True)
    await store.add_run(last := make_record())
    stored = {one for page in await list_ids(store, 1000) for one in page}
    assert {record.run_id for record in records[1::2]} | {last.run_id} <= stored


async def test_what_was_begun_is_finished_before_the_store_closes(tmp_path: Path) -> None:
    store = await Store.open(tmp_path)
    left = asyncio.ensure_future(store.start_job("r", "work"))
    await asyncio.sleep(0)  # it has begun
    await store.close()
    job, _ = await left
    again = await Store.open(tmp_path)
    found = await again.job(job.job_id)
    await again.close()
    assert found == job


async def test_a_closed_store_says_so(tmp_path: Path) -> None:
    store = await Store.open(tmp_path)
    await store.close()
    await store.close()
    with pytest.raises(Unavailable, match="closed"):
        await store.list_runs()

"""The store's cases and jobs: names and request ids stand once, changes are counted, events have no gaps."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from coordinator.store import Store
from coordinator.store.cases import case_to_text, read_case
from dualtrace.library import Case, Job, JobState
from dualtrace.problems import (
    AlreadyExists,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    NotFound,
    Reason,
)
from dualtrace.runs.run import store_problem
from tests.support.stored import make_case, make_comparison, make_record

MISSING = "job-" + "0" * 26


@pytest_asyncio.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await Store.open(tmp_path / "data")
    yield opened
    await opened.close()


def told(case: Case) -> str:
    """Everything in it: questions hold arrays and cannot be compared."""
    return f"{case.revision} {case_to_text(case)}"


async def names(store: Store, tag: str = "") -> list[str]:
    return [case.name for case in (await store.list_cases(tag=tag)).entries]


# Cases


@pytest.mark.parametrize("case", [make_case(), make_case(tolerance=None, tags=(), description="")])
def test_the_text_of_a_case_comes_back_as_the_case(case: Case) -> None:
    assert case_to_text(read_case(case_to_text(case))) == case_to_text(case)


async def test_a_new_case_has_revision_one_and_comes_back_as_it_was(store: Store) -> None:
    created = await store.create_case(make_case())
    assert created.revision == 1
    assert told(await store.get_case("first")) == told(replace(make_case(), revision=1))


async def test_a_name_is_taken_once(store: Store) -> None:
    await store.create_case(make_case())
    with pytest.raises(AlreadyExists, match="first"):
        await store.create_case(make_case(description="another"))
    assert (await store.get_case("first")).description == "a case"


async def test_a_new_case_that_claims_a_revision_is_refused(store: Store) -> None:
    with pytest.raises(InvalidArgument, match="revision 3"):
        await store.create_case(make_case(revision=3))


async def test_an_update_replaces_the_whole_and_counts(store: Store) -> None:
    await store.create_case(make_case())
    changed = make_case(description="changed", tags=("other",), tolerance=None)
    assert (await store.update_case(changed, 1)).revision == 2
    assert told(await store.get_case("first")) == told(replace(changed, revision=2))


async def test_an_update_from_an_old_revision_names_both(store: Store) -> None:
    await store.create_case(make_case())
    await store.update_case(make_case(description="theirs"), 1)
    with pytest.raises(FailedPrecondition, match=r"at revision 2.* from 1") as caught:
        await store.update_case(make_case(description="mine"), 1)
    assert caught.value.reason is Reason.REVISION_CONFLICT
    assert (await store.get_case("first")).description == "theirs"


async def test_of_many_updates_from_one_revision_one_wins(store: Store) -> None:
    await store.create_case(make_case())
    updates = (store.update_case(make_case(description=f"number {i}"), 1) for i in range(20))
    ended = await asyncio.gather(*updates, return_exceptions=True)
    assert [case.revision for case in ended if isinstance(case, Case)] == [2]
    assert sum(isinstance(end, FailedPrecondition) for end in ended) == 19


async def test_a_case_that_is_not_there_cannot_be_changed(store: Store) -> None:
    with pytest.raises(NotFound, match="first"):
        await store.update_case(make_case(), 1)
    with pytest.raises(NotFound, match="first"):
        await store.delete_case("first", 1)


async def test_a_case_is_deleted_with_its_tags(store: Store) -> None:
    await store.create_case(make_case())
    await store.delete_case("first", 1)
    assert await names(store, "smoke") == []
    with pytest.raises(NotFound, match="first"):
        await store.get_case("first")


async def test_a_case_is_not_deleted_from_an_old_revision(store: Store) -> None:
    await store.create_case(make_case())
    await store.update_case(make_case(), 1)
    with pytest.raises(FailedPrecondition, match="at revision 2"):
        await store.delete_case("first", 1)
    assert await names(store) == ["first"]


async def test_a_case_created_again_under_its_name_goes_on_counting(store: Store) -> None:
    await store.create_case(make_case())
    await store.update_case(make_case(), 1)
    await store.delete_case("first", 2)
    assert (await store.create_case(make_case())).revision == 3
    await store.delete_case("first", 3)
    assert (await store.create_case(make_case())).revision == 4


async def test_a_revision_of_a_deleted_case_fits_no_later_one_of_its_name(store: Store) -> None:
    await store.create_case(make_case())
    await store.delete_case("first", 1)
    await store.create_case(make_case(description="another"))
    with pytest.raises(FailedPrecondition, match="at revision 2") as caught:
        await store.update_case(make_case(description="of the old one"), 1)
    assert caught.value.reason is Reason.REVISION_CONFLICT


async def test_a_name_that_was_never_deleted_begins_at_one(store: Store) -> None:
    await store.create_case(make_case())
    await store.delete_case("first", 1)
    assert (await store.create_case(make_case("second"))).revision == 1


async def test_cases_are_listed_by_name_and_tag(store: Store) -> None:
    await store.create_case(make_case("b"))
    await store.create_case(make_case("a"))
    await store.create_case(make_case("c", tags=("other",)))
    assert (await names(store), await names(store, "smoke"), await names(store, "none")) == (
        ["a", "b", "c"], ["a", "b"], []
    )  # fmt: skip


async def test_a_tag_that_an_update_takes_away_finds_the_case_no_more(store: Store) -> None:
    await store.create_case(make_case())
    await store.update_case(make_case(tags=("llama",)), 1)
    assert (await names(store, "smoke"), await names(store, "llama")) == ([], ["first"])


async def test_pages_hold_every_case_of_a_tag_once(store: Store) -> None:
    for name in ("a", "b", "c", "d", "e"):
        await store.create_case(make_case(name))
    found: list[list[str]] = []
    token = ""
    while not found or token:
        page = await store.list_cases(2, token, tag="smoke")
        found.append([case.name for case in page.entries])
        token = page.next_page_token
    assert found == [["a", "b"], ["c", "d"], ["e"]]


# Jobs


async def test_a_new_job_waits(store: Store) -> None:
    job, is_new = await store.start_job("request-1", "the work")
    assert (is_new, job) == (True, Job(job.job_id, "request-1", JobState.WAITING, 0))
    assert await store.job(job.job_id) == job
    assert await store.job_work(job.job_id) == "the work"


async def test_fifty_calls_at_once_with_one_request_id_start_one_job(store: Store) -> None:
    ended = await asyncio.gather(*(store.start_job("request-1", "the work") for _ in range(50)))
    assert len({job.job_id for job, _ in ended}) == 1
    assert sum(is_new for _, is_new in ended) == 1
    assert len(await store.unfinished_jobs()) == 1


async def test_a_request_id_with_other_work_is_refused(store: Store) -> None:
    job, _ = await store.start_job("request-1", "the work")
    with pytest.raises(AlreadyExists, match=job.job_id):
        await store.start_job("request-1", "other work")


@pytest.mark.parametrize("request_id", ["", "a b", "x" * 101])
async def test_a_request_id_that_is_no_name_is_refused(store: Store, request_id: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await store.start_job(request_id, "the work")
    assert caught.value.detail.field == "request_id"


async def test_a_repeated_start_tells_how_the_job_stands(store: Store) -> None:
    job, _ = await store.start_job("request-1", "the work")
    event = await store.add_job_event(job.job_id, JobState.RUNNING)
    assert await store.start_job("request-1", "the work") == (event.job, False)


async def test_events_written_at_once_are_numbered_without_gaps(store: Store) -> None:
    job, _ = await store.start_job("request-1", "the work")
    await asyncio.gather(*(store.add_job_event(job.job_id, JobState.RUNNING, done=i) for i in range(40)))
    events = await store.job_events(job.job_id)
    assert [event.sequence for event in events] == list(range(1, 41))
    assert sorted(event.done for event in events) == list(range(40))
    assert (await store.job(job.job_id)).last_sequence == 40


async def test_an_event_tells_the_job_as_it_stood_then(store: Store) -> None:
    job, _ = await store.start_job("request-1", "the work")
    written = [
        await store.add_job_event(job.job_id, JobState.RUNNING, "half \ud83d", 1, 2, "tokens"),
        await store.add_job_event(job.job_id, JobState.FAILED, problem=Internal(Reason.BUG, "it broke")),
    ]
    assert list(await store.job_events(job.job_id)) == written
    assert [event.job.state for event in written] == [JobState.RUNNING, JobState.FAILED]
    assert (await store.job(job.job_id)).problem == store_problem(Internal(Reason.BUG, "it broke"))


async def test_events_are_told_after_a_number(store: Store) -> None:
    job, _ = await store.start_job("request-1", "the work")
    for _ in range(4):
        await store.add_job_event(job.job_id, JobState.RUNNING)
    assert [event.sequence for event in await store.job_events(job.job_id, 2)] == [3, 4]


async def test_a_result_stays_with_the_job(store: Store) -> None:
    job, _ = await store.start_job("request-1", "the work")
    record, comparison = make_record(), make_comparison()
    await store.add_run(record)
    await store.add_comparison(comparison)
    await store.add_job_event(job.job_id, JobState.RUNNING, run_id=record.run_id)
    ended = await store.add_job_event(job.job_id, JobState.DONE, comparison_id=comparison.comparison_id)
    assert (ended.job.run_id, ended.job.comparison_id) == (record.run_id, comparison.comparison_id)


async def test_an_event_with_a_run_that_is_not_there_is_refused_whole(store: Store) -> None:
    job, _ = await store.start_job("request-1", "the work")
    with pytest.raises(NotFound, match="run-0"):
        await store.add_job_event(job.job_id, JobState.DONE, run_id="run-" + "0" * 26)
    assert await store.job(job.job_id) == job


async def test_nothing_is_added_to_a_job_that_has_ended(store: Store) -> None:
    job, _ = await store.start_job("request-1", "the work")
    await store.add_job_event(job.job_id, JobState.CANCELLED)
    with pytest.raises(FailedPrecondition, match="CANCELLED"):
        await store.add_job_event(job.job_id, JobState.DONE)
    assert (await store.job(job.job_id)).last_sequence == 1


async def test_unfinished_jobs_are_told_after_a_restart_oldest_first(tmp_path: Path) -> None:
    first = await Store.open(tmp_path)
    jobs = [(await first.start_job(f"r{i}", "w"))[0] for i in range(3)]
    await first.add_job_event(jobs[1].job_id, JobState.DONE)
    running = await first.add_job_event(jobs[2].job_id, JobState.RUNNING)
    await first.close()
    second = await Store.open(tmp_path)
    found = await second.unfinished_jobs()
    await second.close()
    assert found == (jobs[0], running.job)


async def test_an_unknown_job_is_not_found(store: Store) -> None:
    for ask in (store.job, store.job_work, store.job_events):
        with pytest.raises(NotFound, match=MISSING):
            await ask(MISSING)
    with pytest.raises(NotFound, match=MISSING):
        await store.add_job_event(MISSING, JobState.RUNNING)


async def test_a_negative_event_number_is_refused(store: Store) -> None:
    job, _ = await store.start_job("request-1", "the work")
    with pytest.raises(InvalidArgument, match="after_sequence -1"):
        await store.job_events(job.job_id, -1)

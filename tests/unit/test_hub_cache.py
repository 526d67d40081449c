"""A model named by its hub id is found in the hub's cache on this disk, and nowhere else."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dualtrace.cli import main
from dualtrace.models.hub_cache import find_model, hub_cache_directory
from dualtrace.problems import Problem, Reason
from dualtrace.targets import TargetOptions, open_target, parse_target
from tests.support.tiny import tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one model, as the hub's own client lays it out."""
    kept = tmp_path / "hub" / "models--tiny--llama"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(COMMIT)
    shutil.copytree(tiny_model(), kept / "snapshots" / COMMIT)
    monkeypatch.setenv("HF_HUB_CACHE", str(kept.parent))

    def no_network(*_: Any, **__: Any) -> None:
        pytest.fail("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    return kept


def refusal(name: str, revision: str = "") -> Problem:
    with pytest.raises(Problem) as caught:
        find_model(name, revision)
    return caught.value


@pytest.mark.parametrize("revision", ["", "main", COMMIT])
def test_an_id_is_found_under_a_branch_or_a_commit(hub: Path, revision: str) -> None:
    found = find_model("tiny/llama", revision)
    assert (found.directory, found.model_id, found.revision) == (hub / "snapshots" / COMMIT, "tiny/llama", COMMIT)


def test_a_folder_comes_before_an_id(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny" / "llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_model("tiny/llama").directory == Path("tiny/llama")


@pytest.mark.parametrize(("name", "revision"), [("tiny/other", ""), ("gpt2", ""), ("tiny/llama", "v2")])
def test_what_is_not_in_the_cache_is_refused_with_the_command_that_fetches_it(
    hub: Path, name: str, revision: str
) -> None:
    problem = refusal(name, revision)
    assert problem.reason is Reason.NOT_FOUND
    assert f"`hf download {name}" + (f" --revision {revision}`" if revision else "`") in str(problem)


def test_a_snapshot_that_was_fetched_in_part_is_refused(hub: Path) -> None:
    (hub / "snapshots" / COMMIT / "config.json").unlink()
    assert "without its config.json" in str(refusal("tiny/llama"))


@pytest.mark.parametrize("revision", ["../../..", "/etc", "a/../b", ""])
def test_nothing_outside_the_cache_is_reached_by_a_revision(hub: Path, revision: str) -> None:
    (hub / "refs" / "main").write_text("../../../outside")
    assert refusal("tiny/llama", revision).reason in (Reason.MALFORMED, Reason.NOT_FOUND)


@pytest.mark.parametrize("name", ["/no/such/folder", "../up", "a/b/c", "tiny/.."])
def test_what_is_neither_a_folder_nor_an_id_is_refused(hub: Path, name: str) -> None:
    assert refusal(name).reason is Reason.NOT_FOUND


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HF_HOME": "/b", "XDG_CACHE_HOME": "/c"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/huggingface/hub"),
        ({}, str(Path.home() / ".cache/huggingface/hub")),
    ],
)
def test_the_cache_is_where_the_hubs_own_client_keeps_it(environment: dict[str, str], wanted: str) -> None:
    assert hub_cache_directory(environment) == Path(wanted)


async def test_a_target_may_name_an_id(hub: Path) -> None:
    scorer = await open_target(parse_target("reference:tiny/llama"), TargetOptions())
    provenance = (await scorer.describe()).provenance
    await scorer.close()
    assert (provenance.model_id, provenance.revision) == ("tiny/llama", COMMIT)


def test_serve_names_the_remedy_for_an_id_that_is_not_here(hub: Path) -> None:
    result = CliRunner().invoke(main, ["serve", "reference", "--model", "tiny/other"])
    assert result.exit_code == 2
    assert "hf download tiny/other" in result.stderr

"""`dualtrace serve` without listening: settings become parts, engines are found by name, mistakes are named."""

import dataclasses
import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dualtrace import engine_registry
from dualtrace.cli import main
from dualtrace.engine import EngineSettings
from dualtrace.engine_registry import find_engine, list_engines
from dualtrace.fake import FakeEngine, load
from dualtrace.problems import InvalidArgument, Reason, Unsupported
from dualtrace.settings import SidecarSettings, list_settings
from tests.support.tiny import tiny_model

serve_module = import_module("dualtrace.cli.serve")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["serve", *(str(one) for one in arguments)])


@pytest.mark.parametrize("field", list_settings(SidecarSettings), ids=lambda field: field.name)
def test_every_setting_is_a_flag(field: object) -> None:
    flags = {name for parameter in main.commands["serve"].params for name in parameter.opts}
    assert field.flag in flags  # type: ignore[attr-defined]


def test_each_setting_reaches_its_part() -> None:
    settings = SidecarSettings(
        batch_tokens=11, queue_limit=12, buffer_megabytes=3, chunk_tokens=13, chunk_milliseconds=14, max_items=15,
        max_top_k=16, max_request_tokens=17, max_request_chars=18,
    )  # fmt: skip
    parts = serve_module.apportion(settings, 99)
    assert (parts.scheduling.batch_tokens, parts.scheduling.queue_calls) == (11, 12)
    assert parts.scheduling.buffer_bytes == 3 * 1024 * 1024
    assert (parts.pace.chunk_tokens, parts.pace.flush_seconds) == (13, 0.014)
    limits = parts.limits
    assert (limits.max_positions, limits.max_items, limits.max_top_k) == (99, 15, 16)
    assert (limits.max_request_tokens, limits.max_request_chars) == (17, 18)


def test_the_settings_defaults_are_the_parts_own() -> None:
    parts = serve_module.apportion(SidecarSettings(), 99)
    for part in (parts.limits, parts.scheduling, parts.pace):
        own = type(part)(**({"max_positions": 99} if part is parts.limits else {}))
        assert dataclasses.asdict(part) == dataclasses.asdict(own)


def test_print_config_shows_value_and_source_and_ends() -> None:
    result = run("fake", "--port", "7", "--print-config")
    assert result.exit_code == 0
    assert "port = 7" in result.stdout
    assert "flag --port" in result.stdout


def test_print_config_as_json() -> None:
    config = json.loads(run("fake", "--no-preflight", "--print-config", "--json").stdout)
    assert config["preflight"] == {"value": False, "source": "flag --preflight"}


def test_a_settings_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "sidecar.toml"
    file.write_text("port = 8\n")
    assert "port = 8" in run("fake", "--config", file, "--print-config").stdout


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["fake", "--port", "65536"], "0 to 65535"),
        (["fake", "--threads", "many"], "whole number"),
        (["reference"], "--model DIR"),
        (["fake", "--spec", "mood=1"], "mood"),
        (["fake", "--config", "absent.toml"], "absent.toml"),
        (["fake", "--tls-key", "absent.pem"], "tls_certificate"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_ends_with_2_and_is_named(arguments: list[str], word: str) -> None:
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert word in result.stderr


def test_an_unknown_engine_is_refused_with_the_installed_ones() -> None:
    result = run("troch", "--model", tiny_model())
    assert result.exit_code == 2
    assert "reference, fake" in result.stderr


def test_the_reference_engine_has_no_spec() -> None:
    result = run("reference", "--model", tiny_model(), "--spec", "seed=1")
    assert (result.exit_code, "option 'spec'" in result.stderr) == (2, True)


@pytest.mark.parametrize("name", list(engine_registry.OWN))
def test_our_own_engines_can_be_found(name: str) -> None:
    assert callable(find_engine(name))


def announce(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    from importlib.metadata import EntryPoint

    points = [EntryPoint(name, value, engine_registry.GROUP)]
    monkeypatch.setattr("dualtrace.engine_registry.metadata.entry_points", lambda group: points)


def test_another_package_can_announce_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, "mine", "dualtrace.fake:load")
    assert find_engine("mine") is load


def test_our_own_names_cannot_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, "fake", "somewhere:else")
    assert list_engines()["fake"] == "dualtrace.fake:load"


def test_an_engine_that_lacks_what_it_needs_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    announce(monkeypatch, "mine", "absent_package_of_ours:load")
    with pytest.raises(Unsupported, match="absent_package_of_ours"):
        find_engine("mine")


def test_the_fake_engine_takes_its_spec_from_the_options() -> None:
    engine = load(EngineSettings(model=Path(), step_tokens=7, options={"spec": "seed=3"}))
    assert isinstance(engine, FakeEngine)
    assert (engine.spec.seed, engine.spec.step) == (3, 7)


def test_the_fake_engine_refuses_other_options() -> None:
    with pytest.raises(InvalidArgument) as caught:
        load(EngineSettings(model=Path(), options={"mood": "x"}))
    assert caught.value.reason is Reason.UNKNOWN_FIELD


def test_help_loads_nothing_heavy() -> None:
    import subprocess

    code = "import sys; from dualtrace.cli import main; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "grpc", "rich", "tokenizers", "google.protobuf"} & set(loaded)

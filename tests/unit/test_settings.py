"""Settings: who wins, what is refused and how, what is shown."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from dualtrace.problems import InvalidArgument, NotFound, Problem, Reason
from dualtrace.settings import SidecarSettings, list_settings, read_settings, setting, show_settings


@dataclass(frozen=True)
class DoorSettings:
    password: str = setting("open sesame", "what to say", secret=True)
    tries: int = setting(3, "how often", low=1, high=9, secret=True)


def write_toml(folder: Path, text: str) -> Path:
    path = folder / "sidecar.toml"
    path.write_text(text)
    return path


def read(
    file: Path | None = None, environ: dict[str, str] | None = None, **flags: object
) -> tuple[SidecarSettings, dict[str, str]]:
    settings, sources = read_settings(SidecarSettings, file=file, environ=environ or {}, flags=flags)
    return settings, dict(sources)


def refusal(file: Path | None = None, environ: dict[str, str] | None = None, **flags: object) -> Problem:
    with pytest.raises(InvalidArgument) as caught:
        read(file, environ, **flags)
    return caught.value


def test_without_any_source_every_setting_is_its_default() -> None:
    settings, sources = read()
    assert settings == SidecarSettings()
    assert set(sources.values()) == {"default"}


def test_a_file_beats_the_default(tmp_path: Path) -> None:
    file = write_toml(tmp_path, "port = 1\n")
    settings, sources = read(file)
    assert (settings.port, sources["port"]) == (1, f"file {file}")


def test_the_environment_beats_the_file(tmp_path: Path) -> None:
    settings, sources = read(write_toml(tmp_path, "port = 1\n"), {"DUALTRACE_PORT": "2"})
    assert (settings.port, sources["port"]) == (2, "environment DUALTRACE_PORT")


def test_a_flag_beats_the_environment(tmp_path: Path) -> None:
    settings, sources = read(write_toml(tmp_path, "port = 1\n"), {"DUALTRACE_PORT": "2"}, port=3)
    assert (settings.port, sources["port"]) == (3, "flag --port")


def test_a_flag_that_is_none_was_not_given() -> None:
    assert read(environ={"DUALTRACE_PORT": "2"}, port=None)[0].port == 2


def test_a_false_flag_was_given() -> None:
    assert read(environ={"DUALTRACE_PREFLIGHT": "true"}, preflight=False)[0].preflight is False


@pytest.mark.parametrize("origin", ["file", "environment", "flag"])
def test_an_unknown_name_is_refused_with_the_nearest_known_one(origin: str, tmp_path: Path) -> None:
    problem = {
        "file": lambda: refusal(write_toml(tmp_path, "que_limit = 1\n")),
        "environment": lambda: refusal(environ={"DUALTRACE_QUE_LIMIT": "1"}),
        "flag": lambda: refusal(que_limit=1),
    }[origin]()
    assert problem.reason is Reason.UNKNOWN_FIELD
    assert "que_limit" in str(problem)
    assert "did you mean 'queue_limit'" in str(problem)
    assert origin in str(problem)


def test_variables_of_other_programs_are_left_alone() -> None:
    assert read(environ={"PORT": "x", "HOME": "/"})[0] == SidecarSettings()


def test_a_variable_that_another_part_reads_is_no_setting() -> None:
    assert read(environ={"DUALTRACE_CACHE": "somewhere"})[0] == SidecarSettings()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("port", "-1"), ("port", "65536"), ("threads", "0"), ("queue_limit", "0"), ("chunk_tokens", "0"),
        ("metrics_port", "65536"), ("drain_seconds", "-0.1"), ("drain_seconds", "nan"), ("drain_seconds", "inf"),
    ],
)  # fmt: skip
def test_a_number_out_of_its_range_is_refused_with_the_range(name: str, text: str) -> None:
    problem = refusal(environ={f"DUALTRACE_{name.upper()}": text})
    assert (problem.reason, problem.detail.field) == (Reason.OUT_OF_RANGE, name)
    assert problem.detail.allowed
    assert problem.detail.allowed in problem.detail.message


@pytest.mark.parametrize(
    ("name", "text"),
    [("port", "ten"), ("port", "1.5"), ("port", ""), ("drain_seconds", "soon"), ("preflight", "maybe")],
)
def test_text_that_is_not_of_the_kind_is_refused_by_name(name: str, text: str) -> None:
    problem = refusal(environ={f"DUALTRACE_{name.upper()}": text})
    assert (problem.reason, problem.detail.field) == (Reason.MALFORMED, name)
    assert repr(text) in problem.detail.message


@pytest.mark.parametrize("line", ['port = "1"', "port = 1.0", "port = true", "preflight = 1", "host = 1", "port = [1]"])
def test_a_file_has_types_and_a_value_of_another_type_is_refused(line: str, tmp_path: Path) -> None:
    assert refusal(write_toml(tmp_path, line)).reason is Reason.MALFORMED


def test_an_empty_host_is_refused() -> None:
    assert refusal(environ={"DUALTRACE_HOST": ""}).reason is Reason.EMPTY


def test_a_whole_number_is_a_number_of_seconds(tmp_path: Path) -> None:
    assert read(write_toml(tmp_path, "drain_seconds = 3"))[0].drain_seconds == 3.0


def test_an_empty_variable_turns_an_optional_setting_off_again(tmp_path: Path) -> None:
    assert read(write_toml(tmp_path, "metrics_port = 9"), {"DUALTRACE_METRICS_PORT": ""})[0].metrics_port is None


def test_a_path_in_a_file_is_meant_from_where_the_file_stands(tmp_path: Path) -> None:
    assert read(write_toml(tmp_path, 'token_file = "tokens"'))[0].token_file == tmp_path / "tokens"


def test_a_path_in_the_environment_is_taken_as_it_is() -> None:
    assert read(environ={"DUALTRACE_TOKEN_FILE": "tokens"})[0].token_file == Path("tokens")


@pytest.mark.parametrize("given", ["tls_certificate", "tls_key"])
def test_a_certificate_without_its_key_or_the_reverse_is_refused(given: str) -> None:
    problem = refusal(environ={f"DUALTRACE_{given.upper()}": "x.pem"})
    assert problem.reason is Reason.CONFLICT
    assert problem.detail.field == {"tls_certificate": "tls_key", "tls_key": "tls_certificate"}[given]


def test_asking_callers_for_certificates_needs_a_certificate_of_our_own() -> None:
    assert refusal(tls_client_ca="ca.pem").reason is Reason.CONFLICT


def test_settings_made_in_code_are_checked_too() -> None:
    with pytest.raises(InvalidArgument, match="0 to 65535"):
        SidecarSettings(port=-1)


def test_a_settings_file_that_is_missing_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"absent\.toml"):
        read(tmp_path / "absent.toml")


@pytest.mark.parametrize("content", [b"port = ", b"\xff\xfe", b"port = 1\nport = 2"])
def test_a_settings_file_that_is_not_toml_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(content)
    problem = refusal(file)
    assert problem.reason is Reason.MALFORMED
    assert "bad.toml" in str(problem)


def test_the_printed_settings_name_value_and_source_of_each() -> None:
    settings, sources = read(environ={"DUALTRACE_PORT": "7"})
    lines = [" ".join(line.split()) for line in show_settings(settings, sources).splitlines()]
    assert len(lines) == len(list_settings(SidecarSettings))
    assert "port = 7 (environment DUALTRACE_PORT)" in lines


def test_a_secret_is_not_shown() -> None:
    settings, sources = read_settings(DoorSettings, file=None, environ={"DUALTRACE_PASSWORD": "hush"}, flags={})
    shown = show_settings(settings, sources)
    assert "password = ***" in shown
    assert "hush" not in shown


@pytest.mark.parametrize("text", ["77", "many"])
def test_a_secret_is_not_told_in_a_refusal(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read_settings(DoorSettings, file=None, environ={"DUALTRACE_TRIES": text}, flags={})
    assert text not in str(caught.value)


def test_every_setting_says_what_it_means_and_every_number_has_a_range() -> None:
    for field in list_settings(SidecarSettings):
        assert field.meaning
        assert field.kind not in {int, float} or field.allowed

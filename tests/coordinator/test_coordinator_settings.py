"""The coordinator's settings: where backends may be written, who wins, what is refused and what is never shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from coordinator.settings import BackendSettings, Configuration, CoordinatorSettings, read_configuration
from dualtrace.problems import InvalidArgument, Problem, Reason
from dualtrace.settings import SidecarSettings, read_settings


def read(
    folder: Path | None = None,
    toml: str = "",
    environ: dict[str, str] | None = None,
    backends: tuple[str, ...] = (),
    **flags: object,
) -> Configuration:
    file = None
    if folder is not None:
        file = folder / "coordinator.toml"
        file.write_text(toml)
    return read_configuration(file=file, environ=environ or {}, flags=flags, backends=backends)


def refusal(**given: Any) -> Problem:
    with pytest.raises(InvalidArgument) as caught:
        read(**given)
    return caught.value


def test_a_backend_can_be_given_by_a_flag_with_its_replicas() -> None:
    (backend,) = read(backends=("torch=a:1,b:2",)).backends
    assert (backend.name, backend.addresses) == ("torch", ("a:1", "b:2"))


def test_backends_can_be_given_by_the_environment() -> None:
    told = read(environ={"DUALTRACE_COORDINATOR_BACKENDS": "torch=a:1 jax=b:2"})
    assert [backend.name for backend in told.backends] == ["jax", "torch"]


def test_a_flag_replaces_the_addresses_of_a_file_and_keeps_its_token(tmp_path: Path) -> None:
    toml = '[backends.torch]\naddresses = ["a:1"]\ntoken = "secret"\n'
    (backend,) = read(tmp_path, toml, backends=("torch=b:2",)).backends
    assert (backend.addresses, backend.token) == (("b:2",), "secret")


def test_a_path_in_a_file_is_meant_from_where_the_file_stands(tmp_path: Path) -> None:
    toml = '[backends.torch]\naddresses = ["a:1"]\ntls = true\nca_file = "ca.pem"\n'
    (backend,) = read(tmp_path, toml).backends
    assert backend.ca_file == tmp_path / "ca.pem"


def test_no_secret_is_ever_shown(tmp_path: Path) -> None:
    told = read(tmp_path, '[backends.torch]\naddresses = ["a:1"]\ntoken = "open-sesame"\n')
    assert "open-sesame" not in told.show() + repr(told)
    assert "token=***" in told.show()


def test_every_value_is_shown_with_its_source(tmp_path: Path) -> None:
    shown = read(tmp_path, "port = 1\n", backends=("torch=a:1",), http_port="").show()
    assert any(line.startswith("port = 1") and "coordinator.toml" in line for line in shown.splitlines())
    assert any(line.startswith("backends.torch = a:1") and "flag --backend" in line for line in shown.splitlines())
    assert any(line.startswith("http_port = none") for line in shown.splitlines())


def test_one_environment_holds_the_settings_of_sidecar_and_coordinator() -> None:
    environ = {"DUALTRACE_PORT": "1", "DUALTRACE_COORDINATOR_PORT": "2", "DUALTRACE_COORDINATOR": "host:3"}
    sidecar, _ = read_settings(SidecarSettings, file=None, environ=environ, flags={})
    assert (sidecar.port, read(environ=environ).settings.port) == (1, 2)


@pytest.mark.parametrize(
    ("toml", "field"),
    [
        ("backends = 3\n", "backends"),
        ("[backends.torch]\n", "backends.torch.addresses"),
        ("[backends.torch]\naddresses = []\n", "backends.torch.addresses"),
        ('[backends.torch]\naddresses = ["a"]\n', "backends.torch.addresses"),
        ('[backends.torch]\naddresses = ["a:1"]\ntls = "yes"\n', "backends.torch.tls"),
        ('[backends.torch]\naddresses = ["a:1"]\nca_file = "x"\n', "backends.torch.ca_file"),
        ('[backends.torch]\naddresses = ["a:1"]\ntoken = "x"\ntoken_file = "y"\n', "backends.torch.token"),
        ('[backends.torch]\naddresses = ["a:1"]\ncolour = "red"\n', "backends.torch.colour"),
        ('[backends."a b"]\naddresses = ["a:1"]\n', "backends"),
        ("prot = 1\n", "prot"),
        ("call_seconds = 10\nmax_call_seconds = 5\n", "call_seconds"),
    ],
)
def test_what_a_file_gets_wrong_is_refused_by_name(tmp_path: Path, toml: str, field: str) -> None:
    assert refusal(folder=tmp_path, toml=toml).detail.field == field


NO_BACKENDS = ("torch", "torch=", "=a:1", "torch=a", "torch=a:0", "torch=a:1,a:1", "torch=::1:5", "torch=http://a:1")


@pytest.mark.parametrize("text", NO_BACKENDS)
def test_a_flag_that_names_no_backend_is_refused(text: str) -> None:
    refusal(backends=(text,))


def test_a_name_given_twice_is_refused() -> None:
    assert refusal(backends=("torch=a:1", "torch=b:1")).reason is Reason.DUPLICATE


def test_a_dns_name_stands_alone() -> None:
    with pytest.raises(InvalidArgument):
        BackendSettings("torch", ("dns:///a:1", "b:2"))


def test_the_data_folder_is_the_users_where_none_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DUALTRACE_DATA", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    assert CoordinatorSettings().folder == tmp_path / "dualtrace"

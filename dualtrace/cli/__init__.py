"""The command line: `dualtrace`. One file per noun; heavy things are imported when a command runs, not before."""

from __future__ import annotations

from typing import Any

import click

from dualtrace import __version__
from dualtrace.cli.adapter import adapter
from dualtrace.cli.backend import backend
from dualtrace.cli.case import case
from dualtrace.cli.compare import compare
from dualtrace.cli.comparison import comparison
from dualtrace.cli.demo import demo
from dualtrace.cli.describe import describe
from dualtrace.cli.diff import diff
from dualtrace.cli.exits import guard
from dualtrace.cli.health import health
from dualtrace.cli.job import job
from dualtrace.cli.logprob import logprob
from dualtrace.cli.mask import mask
from dualtrace.cli.masked import masked
from dualtrace.cli.model import model
from dualtrace.cli.next import next_tokens
from dualtrace.cli.preflight import preflight
from dualtrace.cli.rolling import rolling
from dualtrace.cli.run import run
from dualtrace.cli.score import score
from dualtrace.cli.serve import serve
from dualtrace.cli.tokenize import tokenize
from dualtrace.cli.up import up


class Commands(click.Group):
    """The root: whatever a command raises becomes a message and an exit code here."""

    def invoke(self, ctx: click.Context) -> Any:
        with guard(ctx):
            return super().invoke(ctx)


@click.group(
    "dualtrace", cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, "-V", "--version", prog_name="dualtrace", help="Show the version and end.")
def main() -> None:
    """Score text with causal language models, and find out whether two scorings agree.

    \b
    A TARGET is what is asked:
      grpc://HOST:PORT      a running sidecar (grpcs:// over TLS)
      torch:DIR, jax:DIR    that engine over a checkpoint folder, in this process
      reference:DIR         the float64 engine, likewise
      fake:SPEC             an engine without a model, for tries
      py:MODULE:FUNCTION    any logits(ids[T]) -> [T, V]
      FILE.json, run:ID     a stored run, replayed
      backend:NAME          a coordinator's backend, to compare with

    \b
    Exit codes: 0 well; 1 some items or a verdict failed; 2 wrong usage;
    3 backend unavailable; 130 interrupted.
    """


_ASKING = (describe, tokenize, logprob, rolling, next_tokens, score, masked, preflight, mask)
for _command in (*_ASKING, compare, diff, case, run, comparison, job, backend, serve, up, health, model, adapter, demo):
    main.add_command(_command)

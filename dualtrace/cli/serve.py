"""`dualtrace serve`: one sidecar process around an engine.

It maps settings onto the parts that use them, and nothing else: the listening is `server`'s, the answering is
`engine_scorer`'s.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dualtrace.cli.inputs import FOLDER, command_options, parse_adapters
from dualtrace.cli.setting_flags import pop_flags, setting_options
from dualtrace.problems import InvalidArgument, Reason
from dualtrace.settings import SettingField, SidecarSettings, Sources, list_settings, read_settings, show_settings

if TYPE_CHECKING:
    from dualtrace.card import Limits
    from dualtrace.engine import EngineSettings
    from dualtrace.engine_scorer import EngineScorer, StreamPace
    from dualtrace.listening import Announce
    from dualtrace.metrics import Metrics
    from dualtrace.scheduler import SchedulerLimits

Function = Callable[..., Any]


@click.command()
@click.argument("engine")
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    metavar="DIR|HF-ID",
    help="Checkpoint folder, or hub id of a model in this machine's hub cache; every engine but fake needs one.",
)
@click.option("--spec", help="What the fake engine does: name=value joined by commas.")
@click.option("--tokenizer", type=FOLDER, help="Folder of the tokenizer, where it is not the model's own.")
@click.option("--model-id", default="", help="Name of the model in answers; default: the folder's.")
@click.option("--revision", default="", help="Revision of the model in answers.")
@click.option("--dtype", default="", help="Number type of the weights; default: the engine's own.")
@click.option("--device", default="cpu", show_default=True, help="Where the engine computes.")
@click.option("--adapter", "adapters", multiple=True, metavar="NAME=DIR", help="PEFT adapter to load; repeat it.")
@click.option("--mesh", metavar="N", help="Share the weights among N devices (jax only).")
@click.option("--config", type=click.Path(dir_okay=False, path_type=Path), help="TOML file of settings.")
@click.option("--print-config", is_flag=True, help="Show every setting with its source, and end.")
@click.option("--stop-with-stdin", is_flag=True, help="Stop when standard input ends: for a parent that may be killed.")
@setting_options(SidecarSettings)
@command_options
def serve(
    engine: str, config: Path | None, print_config: bool, stop_with_stdin: bool, as_json: bool, **given: Any
) -> None:
    """Serve ENGINE (torch, jax, reference, fake, or an installed one) over gRPC until it is told to stop.

    Prints `listening on HOST:PORT` on standard output when it is ready; before that the port answers health checks
    with NOT_SERVING and refuses the rest. SIGTERM or Ctrl-C lets running calls end
    first; a second one stops at once.
    """
    flags = pop_flags(SidecarSettings, given)
    settings, sources = read_settings(SidecarSettings, file=config, environ=os.environ, flags=flags)
    if print_config:
        click.echo(_config_to_json(settings, sources) if as_json else show_settings(settings, sources))
        return
    if stop_with_stdin:
        from dualtrace.listening import stop_with_stdin as watch_stdin

        watch_stdin()
    _run(engine, settings, as_json, **given)


def _run(
    name: str, settings: SidecarSettings, as_json: bool, model: Path | None, spec: str | None,
    tokenizer: Path | None, adapters: tuple[str, ...], mesh: str | None, **engine_options: str,
) -> None:  # fmt: skip
    import asyncio

    from dualtrace.engine import EngineSettings
    from dualtrace.metrics import Metrics
    from dualtrace.models.hub_cache import find_model
    from dualtrace.server import serve as serve_scorer

    if model is None and name != "fake":
        message = f"the engine {name} needs --model DIR or HF-ID; `dualtrace model tiny DIR` makes a small one"
        raise InvalidArgument(Reason.MISSING, message, field="--model")
    if adapters and name == "fake":
        message = "the fake engine has no weights that an adapter could change; leave --adapter out"
        raise InvalidArgument(Reason.CONFLICT, message, field="--adapter")
    metrics = Metrics()
    if model is not None:
        found = find_model(model, engine_options["revision"])
        model, engine_options["revision"] = found.directory, found.revision
        engine_options["model_id"] = engine_options["model_id"] or found.model_id
    engine_settings = EngineSettings(
        model=model or Path(),
        threads=settings.threads,
        step_tokens=settings.step_tokens,
        adapters=parse_adapters(adapters),
        # An engine refuses by name what is not its own.
        options={key: value for key, value in (("spec", spec), ("mesh", mesh)) if value is not None},
        **engine_options,  # dtype, device, model_id, revision
    )

    def load(tell: Announce) -> EngineScorer:
        return load_scorer(name, engine_settings, tokenizer or model, settings, metrics, tell)

    asyncio.run(serve_scorer(load, settings, metrics, lambda message: _announce(message, as_json)))


def load_scorer(
    name: str,
    engine_settings: EngineSettings,
    tokenizer: Path | None,
    settings: SidecarSettings,
    metrics: Metrics,
    tell: Announce,
) -> EngineScorer:
    """The engine of that name behind a queue, all as the settings say."""
    from dualtrace import __version__
    from dualtrace.engine_registry import find_engine
    from dualtrace.engine_scorer import EngineScorer
    from dualtrace.fake import fake_tokenizer
    from dualtrace.preparing import warm_up
    from dualtrace.tokens import Tokenizer

    load = find_engine(name)
    begun = time.monotonic()
    tell(f"loading {name} {engine_settings.model if tokenizer else ''}".rstrip())
    words = fake_tokenizer() if tokenizer is None else Tokenizer.from_directory(tokenizer)
    engine = load(engine_settings)
    tell(f"loaded in {time.monotonic() - begun:.1f} s")
    if settings.warm_up:
        warm_up(engine, metrics, tell)
    known = engine.card.provenance
    metrics.describe_build(version=__version__, framework=known.framework, dtype=known.dtype)
    parts = apportion(settings, engine.card.max_positions)
    return EngineScorer(
        engine, words, limits=parts.limits, scheduling=parts.scheduling, pace=parts.pace, metrics=metrics
    )


@dataclass(frozen=True)
class Parts:
    """The settings, as the parts of a sidecar take them."""

    limits: Limits
    scheduling: SchedulerLimits
    pace: StreamPace


def apportion(settings: SidecarSettings, max_positions: int) -> Parts:
    """Settings to limits, queue and pace: the only place that knows which setting goes where."""
    from dualtrace.card import Limits
    from dualtrace.engine_scorer import StreamPace
    from dualtrace.scheduler import SchedulerLimits

    return Parts(
        limits=Limits(
            max_positions=max_positions,
            max_items=settings.max_items,
            max_top_k=settings.max_top_k,
            max_request_tokens=settings.max_request_tokens,
            max_request_chars=settings.max_request_chars,
        ),
        scheduling=SchedulerLimits(
            batch_tokens=settings.batch_tokens,
            queue_calls=settings.queue_limit,
            buffer_bytes=settings.buffer_megabytes << 20,
        ),
        pace=StreamPace(settings.chunk_tokens, settings.chunk_milliseconds / 1e3),
    )


def _announce(message: str, as_json: bool) -> None:
    """Where it listens is data; the rest is talk."""
    what, _, address = message.partition(" on ")
    if what != "listening":
        click.echo(message, err=True)
    elif as_json:
        click.echo(json.dumps({"kind": "dualtrace.listening", "address": address}))
    else:
        click.echo(message)


def _config_to_json(settings: SidecarSettings, sources: Sources) -> str:
    fields = list_settings(SidecarSettings)
    return json.dumps(
        {
            field.name: {"value": _plain(field, getattr(settings, field.name)), "source": sources[field.name]}
            for field in fields
        }
    )


def _plain(field: SettingField, value: Any) -> Any:
    return field.show(value) if field.secret or isinstance(value, Path) else value

"""`dualtrace adapter`: LoRA adapters as PEFT folders, made for tests or looked at."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dualtrace.cli.inputs import FOLDER, command_options
from dualtrace.cli.visible import show_line
from dualtrace.problems import InvalidArgument, Reason, Unsupported

if TYPE_CHECKING:
    from dualtrace.adapters.peft_config import PeftConfig
    from dualtrace.checkpoint import TensorEntry


@click.group()
def adapter() -> None:
    """Make a tiny LoRA adapter, or look at one."""


@adapter.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--model", type=FOLDER, required=True, help="Checkpoint folder that the adapter is for.")
@click.option("--rank", type=int, default=4, show_default=True, help="Rank of its factors.")
@click.option("--alpha", type=int, default=8, show_default=True, help="Its delta is scaled by alpha / rank.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same bytes everywhere.")
@click.option("--targets", help="Linear modules joined by commas, or all-linear; default: the family's usual ones.")
@command_options
def tiny(directory: Path, model: Path, rank: int, alpha: int, seed: int, targets: str | None, as_json: bool) -> None:
    """Write a tiny random PEFT adapter for the model to DIRECTORY, for tests and first tries."""
    from dualtrace.cli.output import write_json
    from dualtrace.models.tiny_adapter import Targets, write_tiny_adapter

    chosen: Targets = None
    if targets is not None:
        chosen = "all-linear" if targets == "all-linear" else tuple(targets.split(","))
    written = write_tiny_adapter(directory, model, rank=rank, alpha=alpha, seed=seed, targets=chosen)
    if as_json:
        fields = {"rank": rank, "alpha": alpha, "seed": seed, "targets": targets}
        write_json({"kind": "dualtrace.adapter", "directory": str(written), **fields})
    else:
        click.echo(written)


@adapter.command("show")
@click.argument("directory", type=FOLDER)
@command_options
def show_adapter(directory: Path, as_json: bool) -> None:
    """Say what the PEFT adapter in DIRECTORY adapts; one that cannot be used is refused by name.

    Whether it fits a model is said where it is loaded: --adapter NAME=DIR.
    """
    from rich.text import Text

    from dualtrace.adapters.peft_config import read_peft_config
    from dualtrace.cli.output import show, write_json
    from dualtrace.cli.tables import pairs_table

    modules = _modules(directory)
    config = read_peft_config(directory / "adapter_config.json")
    facts = _facts(config, modules)
    if as_json:
        write_json({"kind": "dualtrace.adapter", "directory": str(directory), **facts, "modules": modules})
        return
    lines = [(name.replace("_", " "), Text(show_line(_say(value), 200))) for name, value in facts.items()]
    show([pairs_table(lines)])


def _modules(directory: Path) -> list[dict[str, Any]]:
    """The adapted modules as the weights have them, sorted by name."""
    from dualtrace.adapters.peft_folder import FACTOR_NAME, WEIGHTS
    from dualtrace.checkpoint import read_safetensors_header

    pairs: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in read_safetensors_header(directory / WEIGHTS).items():
        match = FACTOR_NAME.fullmatch(name)
        if match is None or len(entry.shape) != 2:
            message = (
                f"{directory} holds the tensor {name!r:.120}, which is no LoRA factor; only plain LoRA is understood"
            )
            raise Unsupported(Reason.ADAPTER_UNSUPPORTED, message)
        pairs.setdefault(match[1], {})[match[2]] = entry
    alone = next((module for module, pair in pairs.items() if len(pair) != 2), None)
    if alone is not None:
        message = f"{directory} has one factor of {alone:.120} and not the other"
        raise InvalidArgument(Reason.ADAPTER_MISMATCH, message)
    return [
        {"name": name, "rank": a.shape[0], "in": a.shape[1], "out": b.shape[0], "dtype": a.dtype}
        for name in sorted(pairs)
        for a, b in [(pairs[name]["A"], pairs[name]["B"])]
    ]


def _facts(config: PeftConfig, modules: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "rank": config.rank,
        "alpha": config.alpha,
        "rslora": config.use_rslora,
        "targets": "every linear module" if config.targets is None else sorted(config.targets),
        "excluded": sorted(config.excluded),
        "layers": "all" if config.layers is None else sorted(config.layers),
        "adapted_modules": len(modules),
        "kinds": sorted({str(module["name"]).rsplit(".", 1)[-1] for module in modules}),
        "scalings": sorted({config.scaling_of(str(module["name"])) for module in modules}),
        "parameters": sum(module["rank"] * (module["in"] + module["out"]) for module in modules),
    }


def _say(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(str(one) for one in value) or "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)

"""Settings become an engine: checkpoint, family, device, weights, adapters, card.

It knows where everything comes from. It must not know how a forward is made.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from backend_jax.architecture import Architecture
from backend_jax.config import Keys
from backend_jax.device import PRECISION, house_rules, keep_compiled, start_client
from backend_jax.engine import JaxEngine
from backend_jax.families import Family, find_family
from backend_jax.mesh import AXIS, OPTION, Spread, open_spread
from backend_jax.programs import Programs
from backend_jax.reader import Reader
from backend_jax.runner import Runner
from backend_jax.shapes import describe_buckets
from backend_jax.weights import load_weights, module_names
from dualtrace.adapters import AdapterShelf
from dualtrace.checkpoint import Checkpoint, open_checkpoint, weights_digest
from dualtrace.engine import EngineSettings
from dualtrace.model_card import EngineCapabilities, ModelCard, ModelProvenance
from dualtrace.models.cache import cache_directory
from dualtrace.problems import InvalidArgument, Reason, Unsupported

DTYPES = {"float32": np.dtype(np.float32), "float64": np.dtype(np.float64), "bfloat16": np.dtype(jnp.bfloat16)}


def load(settings: EngineSettings) -> JaxEngine:
    """Load a checkpoint. Float32 with full-precision products unless settings say bfloat16 or float64.

    Threads are a property of the process: the first load sets them, a later one must ask for the same number.
    """
    dtype = _check(settings)
    device = start_client(settings.device, settings.threads)
    keep_compiled(cache_directory() / "jax")
    checkpoint = open_checkpoint(settings.model)
    family = find_family(checkpoint.config.get("model_type"))
    keys = Keys(checkpoint.config)
    architecture = family.read(keys)
    keys.finish()
    spread = open_spread(settings.options.get(OPTION), device, settings.device, architecture)
    with house_rules(), jax.default_device(device):
        weights = load_weights(checkpoint, family, architecture, dtype, spread)
    modules = module_names(family, architecture)
    shelf = AdapterShelf.open(
        settings.adapters, {name: architecture.linear_shape(role)[::-1] for name, (role, _layer) in modules.items()}
    )
    card = _card(settings, checkpoint, family, architecture, _name_device(device, spread), shelf.digests)
    checkpoint.close()
    programs = Programs()
    runner = Runner(architecture, weights, programs, modules, shelf.delta, spread)
    head = weights["embedding"] if architecture.tied else weights["head"]
    reader = Reader(programs, head, architecture.logit_softcap, spread)
    return JaxEngine(card, runner, reader, programs, settings.step_tokens)


def _check(settings: EngineSettings) -> np.dtype[Any]:
    name = settings.dtype or "float32"
    if name not in DTYPES:
        allowed = ", ".join(DTYPES)
        message = f"dtype {name!r} asked; the JAX engine knows {allowed}"
        raise Unsupported(Reason.MODEL_UNSUPPORTED, message, field="dtype", allowed=allowed)
    if strange := set(settings.options) - {OPTION}:
        unknown = min(strange)
        message = f"option {unknown!r} given; the JAX engine knows {OPTION}"
        raise InvalidArgument(Reason.UNKNOWN_FIELD, message, field=unknown, allowed=OPTION)
    if settings.step_tokens < 1:
        message = f"step_tokens {settings.step_tokens} asked; at least 1"
        raise InvalidArgument(Reason.OUT_OF_RANGE, message, field="step_tokens", allowed="1 or more")
    dtype: np.dtype[Any] = DTYPES[name]
    return dtype


def _name_device(device: jax.Device, spread: Spread | None) -> str:
    plain = device.platform == "cpu"
    if spread is None:
        return "cpu" if plain else f"{device.platform}:{device.id} {device.device_kind}"
    kind = "cpu" if plain else f"{device.platform} {device.device_kind}"
    return f"{kind} x{spread.size} (mesh {AXIS}={spread.size})"


def _card(
    settings: EngineSettings,
    checkpoint: Checkpoint,
    family: Family,
    architecture: Architecture,
    device: str,
    adapter_digests: tuple[tuple[str, str], ...],
) -> ModelCard:
    dtype = settings.dtype or "float32"
    provenance = ModelProvenance(
        model_id=settings.model_id or settings.model.resolve().name,
        revision=settings.revision,
        family=architecture.family,
        weights_digest=weights_digest(checkpoint, cache_directory()),
        tokenizer_digest="",
        framework="jax",
        framework_version=f"jax {jax.__version__}",
        dtype=dtype,
        matmul_precision="float64" if dtype == "float64" else PRECISION,
        device=device,
        attention_implementation="two-part",
        adapter_digests=adapter_digests,
    )
    return ModelCard(
        provenance=provenance,
        capabilities=EngineCapabilities(
            steps=True, shares_prefixes=True, deterministic=True, masks=True, views=True, contrasts=True
        ),
        vocab_size=architecture.vocab_size,
        max_positions=architecture.max_positions,
        layers=architecture.layers,
        query_heads=architecture.query_heads,
        kv_heads=architecture.kv_heads,
        hidden_size=architecture.hidden_size,
        windows=architecture.windows,
        buckets=describe_buckets(architecture.max_positions),
    )

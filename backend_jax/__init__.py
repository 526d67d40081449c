"""The JAX backend: its own decoder behind the engine seam of `dualtrace.engine`, an independent second opinion.

    load(settings) -> Engine   the only public name
    engine, loading            the engine itself; settings, checkpoint and device become one
    families/                  one small declarative file per model family: config keys and weight names
    architecture, config, rope what a family's file is written with
    mesh                       one model over several devices
    weights                    the checkpoint's tensors, stacked over layers
    model, attention, lora     the decoder, as compiled functions
    shapes, programs           padded buckets and the compiled functions that exist
    call, masking              segments become the arrays of one call
    runner                     a call run by the function that fits
    rehearsal, warm            what a batch, and what usual batches, need compiled
    forest, fork               which calls answer a batch, and which rows stand for which
    readout, reader            reading the logits
    device                     threads, precision, the compilation cache

It must not know torch, transformers, text, protobuf, batching policy, the coordinator or the PyTorch backend.
"""

from backend_jax.loading import load

__all__ = ["load"]

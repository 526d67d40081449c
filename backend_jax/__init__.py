"""The JAX backend: its own decoder behind the engine seam of `dualtrace.engine`, an independent second opinion.

Here will stand `load(settings) -> Engine`, its only public name, with model, weights, readout and shapes behind it.
It must not know torch, transformers, text, protobuf, batching policy, the coordinator or the PyTorch backend.
"""

"""The PyTorch backend: transformers models behind the engine seam of `dualtrace.engine`.

Here will stand `load(settings) -> Engine`, its only public name, with attention, weights and readout behind it. It
knows token ids and tensors; it must not know text, protobuf, batching policy, the coordinator or the JAX backend.
"""

"""The reference engine: a slow, plain decoder in float64 numpy. It is the oracle, so it stays easy to read.

It knows Llama-family and GPT-2-family checkpoints. `load` is all that others need of it; `reference.readout` is pure
and is shared with the fake engine.
"""

from dualtrace.reference.engine import load

__all__ = ["load"]

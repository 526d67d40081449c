"""The PyTorch backend: transformers models behind the engine seam of `dualtrace.engine`.

    families    which model families are served, and what their configs may say
    weights     a checkpoint becomes a model whose attention is ours
    requests    a batch is checked before anything runs
    strands     segments on their way, cut into the pieces of one pass
    forks       pieces that are the same computation up to some layer
    attention   the one attention function of all families
    sight       who may see whom, as the tensor that is applied, and its count
    blame       where numbers first stopped being finite
    lora        deltas added to the rows that wear them
    readout     logits of the rows that are read, and the numbers in them
    engine      all of it together

`load(settings) -> Engine` is its only public name. It knows token ids and tensors; it must not know text, protobuf,
batching policy, the coordinator or the JAX backend.
"""

from backend_torch.engine import load

__all__ = ["load"]

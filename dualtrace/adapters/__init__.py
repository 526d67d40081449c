"""Adapters: LoRA factors from PEFT folders, and the delta that a view adds to each linear module.

    factors      the two matrices and the scaling of one module
    peft_config  adapter_config.json: what is understood, everything else refused by name
    peft_folder  the folder: its tensors, fitted to the model's modules
    shelf        the adapters of one engine, and the delta of each view

The package knows module names, shapes and float32 numbers. It must not know engines, frameworks or the wire.
"""

from dualtrace.adapters.factors import Delta, Factors
from dualtrace.adapters.shelf import AdapterShelf

__all__ = ["AdapterShelf", "Delta", "Factors"]

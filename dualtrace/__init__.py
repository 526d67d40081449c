"""Score text with causal language models and find out whether two scorings agree.

This package holds everything that knows no framework. It never imports torch, jax or transformers.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("dualtrace")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

"""`python -m backend_jax --model DIR`: serve a model with this engine, as `dualtrace serve jax` does.

It knows the name of the command. It must not know its options.
"""

import sys

from dualtrace.cli import main

if __name__ == "__main__":
    main(["serve", "jax", *sys.argv[1:]])

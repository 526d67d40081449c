"""The mask language: who may see whom, as data that is parsed, digested, compiled, explained and proved applied.

    spec        the immutable objects of a mask; every syntax error is raised when one is made
    json_form   the canonical JSON twin and the digest
    arrays      NPY files and JSON matrices, read without trusting them
    resolve     spans become token ranges, names become layers that exist
    runs        boolean matrices as run-lengths
    rules       base, edges, windows and empty rows, once per distinct (layer, head) rule
    plan        what an engine obeys
    leaks       which rows see the token they predict
    naive       the same mask, entry by entry, and why: the oracle of the compiler
    receipt     the proof that an engine applied a mask
    packing     packed scoring as a mask and positions
    picture     PNG and terminal drawings

The package knows token indices, booleans and bytes. It must not know protobuf, gRPC, asyncio, tokenizers or engines.
"""

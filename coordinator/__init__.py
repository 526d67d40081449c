"""The coordinator: asks several sidecars one question, compares the answers, judges and remembers.

Here will stand named backends, the store of runs and cases, and the operations behind two thin faces (gRPC and
HTTP). It may build on `dualtrace`; it must not know torch, jax, transformers or any backend's package.
"""

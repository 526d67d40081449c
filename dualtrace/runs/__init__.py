"""Runs: one side's complete answer, how it is collected, written down, kept and replayed.

It knows answers and their JSON form. It must not know files, the wire or the store.
"""

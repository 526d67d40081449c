"""Asking two sides one question and holding the answers against each other while they arrive.

It knows Scorers and the comparator of `dualtrace.compare`. It must not know targets, processes or the wire.
"""

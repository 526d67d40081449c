"""Where model directories come from: tiny random ones for tests, and a real one out of a package registry.

It knows files and weights. It must not know engines, questions or the wire.
"""

"""Where model directories come from, tiny random ones and a real one, and what in them changes no number.

It knows files and weights. It must not know engines, questions or the wire.
"""

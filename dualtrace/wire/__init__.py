"""Protobuf to frozen dataclasses and back, both ways, and nothing else; one module per proto file.

No default is filled in here and nothing is judged, except what only the wire can know: a oneof that is not set, an
enum value without a meaning, a field this version does not know.
"""

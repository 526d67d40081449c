"""Two sides held against each other. Pure: values in, verdicts out; it must not know scorers, files or the wire."""

"""Cases in files: YAML and JSON a person writes, read with the line of every mistake, and JUnit for whoever runs them.

It knows the form of case files. It must not know who asks the sides, or the store.
"""

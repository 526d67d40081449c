"""Each question as rows to run and reads to make, and the answer read back from the readouts. Pure.

It must not know queues, threads, the wire or how an engine works.
"""

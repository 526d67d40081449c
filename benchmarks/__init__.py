"""Benchmarks: one command (`make bench`), one table. They measure and print; they judge nothing."""

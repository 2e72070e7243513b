"""Benchmarks. `make bench` runs them all; each module runs alone as `python -m bench.linear`, with `--help`.

Every module checks a result before it times it, and writes JSON to bench/results/ with machine, commit and versions.
"""

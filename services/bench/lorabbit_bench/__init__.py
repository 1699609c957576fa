"""Benchmarks as commands: `lorabbit compare` and `lorabbit stress`, added through entry points.

Importers: none.
"""

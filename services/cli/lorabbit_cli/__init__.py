"""The command `lorabbit`.

Importers: lorabbit_bench.
"""

"""Commands that need no services: embedded runs, dry runs, replay and export.

Importers: lorabbit_cli, lorabbit_bench.
"""

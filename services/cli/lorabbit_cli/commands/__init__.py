"""Definitions of the commands; each imports its work when it runs.

Importers: lorabbit_cli.__main__.
"""

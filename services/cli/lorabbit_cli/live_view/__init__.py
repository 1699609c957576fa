"""The live view of a running job in a terminal.

Importers: lorabbit_cli.commands.
"""

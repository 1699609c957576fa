"""The interface that each method implements, and its default: averaging.

Importers: lorabbit.methods, lorabbit_server, lorabbit_cli.local.
"""

"""Files of a run: its directory, exported adapters, and archived updates.

Importers: lorabbit_server.transfer, lorabbit_server.job, lorabbit_cli.local.
"""

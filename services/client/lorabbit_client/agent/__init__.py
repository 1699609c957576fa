"""The protocol side of a client: registration, tasks, journal, payload cache and credentials. Imports no torch.

Importers: lorabbit_client.__main__, lorabbit_cli, lorabbit_bench.stress.
"""

"""Job events, which the server logs for each job, and the report that is computed from them.

Importers: lorabbit_server, lorabbit_cli, lorabbit_bench.
"""

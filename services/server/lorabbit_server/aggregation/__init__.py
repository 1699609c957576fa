"""Validation of uploaded updates, aggregation of a round, and the stored versions of the model.

Importers: lorabbit_server.transfer, lorabbit_server.job, lorabbit_cli.local.
"""

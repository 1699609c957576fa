"""Differential privacy: the Gaussian mechanism and its accountant.

See docs/explanation/privacy.md.

Importers: lorabbit.methods, lorabbit_server.aggregation, lorabbit_client.
"""

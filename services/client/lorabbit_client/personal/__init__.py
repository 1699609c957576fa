"""Training for methods in which each client has a model of its own.

Importers: lorabbit_client.executor.
"""

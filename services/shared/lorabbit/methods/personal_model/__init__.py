"""Methods in which each client trains a model of its own architecture and shares something smaller.

Importers: lorabbit.methods, lorabbit_client.executor.
"""

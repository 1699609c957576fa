"""Training and evaluation on the shared base model.

Importers: lorabbit_client, lorabbit_bench.stress.
"""

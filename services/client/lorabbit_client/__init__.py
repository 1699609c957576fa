"""The LoRAbbit client: receives tasks, trains on local data, and uploads updates.

Importers: lorabbit_cli, lorabbit_bench.stress.
"""

"""The LoRAbbit server: queues jobs, runs their rounds, and serves the HTTP API.

Importers: lorabbit_cli.commands, lorabbit_cli.local.
"""

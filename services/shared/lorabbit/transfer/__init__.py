"""Payload transfer: tensor files cut into chunks, verified, and published to streams.

Importers: lorabbit_server, lorabbit_client.agent, lorabbit_cli.local.
"""

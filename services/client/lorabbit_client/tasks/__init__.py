"""Learning tasks: how records are checked, encoded and scored.

Importers: lorabbit_client.
"""

"""Data sources, file formats, tables, partitioners, and encoded features.

Importers: lorabbit_client.
"""

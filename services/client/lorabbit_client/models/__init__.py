"""Base models, and the ways to make some of their parameters trainable.

Importers: lorabbit_client.
"""

"""Measurements of a model that methods ask for: Fisher information, curvature, sensitivity and difficulty.

Importers: lorabbit_client.training.
"""

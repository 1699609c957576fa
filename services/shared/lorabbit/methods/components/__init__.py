"""Algorithms that methods are built from, independent of jobs and of the network.

Importers: lorabbit.methods.shared_model.
"""

"""Robust aggregation: bounds what a minority of hostile clients can do to a round.

See docs/explanation/robustness.md.

Importers: lorabbit.methods, lorabbit_server.aggregation.
"""

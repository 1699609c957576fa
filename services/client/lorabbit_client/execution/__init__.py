"""Execution of tasks outside the protocol loop: runners, worker processes, and private state. Imports no torch.

Importers: lorabbit_client, lorabbit_cli, lorabbit_bench.stress.
"""

"""Scaling of client pools on processes, Docker, Compose and Kubernetes.

Importers: lorabbit_cli.commands, lorabbit_bench.
"""

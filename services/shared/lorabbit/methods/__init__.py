"""Federated methods: the registry by name, and the checks of a job's settings against each other.

Importers: lorabbit.job_loader, lorabbit_server, lorabbit_client, lorabbit_cli.
"""

"""The HTTP API: jobs, clients, access control, health and Prometheus metrics.

Importers: lorabbit_server.__main__.
"""

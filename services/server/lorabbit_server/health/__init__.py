"""Health of the server's dependencies, and faults of the server that delay a job.

Importers: lorabbit_server.server, lorabbit_server.api, lorabbit_server.__main__.
"""

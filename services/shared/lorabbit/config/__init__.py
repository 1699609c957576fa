"""Settings from environment variables, logging, TLS and the URLs of services, and the requests of enrollment.

Importers: lorabbit.broker, lorabbit.state, lorabbit_server, lorabbit_client, lorabbit_cli, lorabbit_bench.
"""

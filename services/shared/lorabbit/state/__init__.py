"""The state store as an interface, and its driver over Redis or fakeredis. The only importer of redis.

Importers: lorabbit_server, lorabbit_cli.doctor, lorabbit_cli.local.
"""

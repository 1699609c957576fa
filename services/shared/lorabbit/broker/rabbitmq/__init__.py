"""The RabbitMQ driver: one connection to publish and one to consume, each on a thread of its own.

The only importer of pika.

Importers: lorabbit_server.__main__, lorabbit_client.__main__, lorabbit_cli.doctor, lorabbit_bench.stress.
"""

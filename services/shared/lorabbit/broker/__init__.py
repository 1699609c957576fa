"""The message broker: its interface, an in-memory driver, the RabbitMQ driver, and the names of its queues.

Importers: lorabbit.transfer, lorabbit_server, lorabbit_client.agent, lorabbit_client.__main__, lorabbit_cli,
lorabbit_bench.stress.
"""

"""Registered clients: leases, enrollment, duplicate addresses, and their queues in RabbitMQ.

Importers: lorabbit_server.
"""

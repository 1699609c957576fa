"""Federated LoRA fine-tuning over RabbitMQ: the library that the server and the clients share.

Importers: any package.
"""

__version__ = "0.1.0"

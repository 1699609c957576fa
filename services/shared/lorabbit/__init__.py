"""LoRAbbit: federated LoRA fine-tuning over RabbitMQ. This package is what both services speak."""

__version__ = "0.1.0"

"""The failure matrix: one row per crash point or fault, played on real processes over a real RabbitMQ and Redis."""

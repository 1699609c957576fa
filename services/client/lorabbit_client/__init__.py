"""The client: owns private data and a base model, trains, and keeps its secrets on its own disk."""

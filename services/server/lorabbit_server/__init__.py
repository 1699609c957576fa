"""The server: owns jobs and rounds, sees named tensors only, and can be killed at any instruction."""

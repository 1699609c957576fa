"""Scaling: how many clients a pool has, whatever runs them: processes, containers, compose, Kubernetes."""

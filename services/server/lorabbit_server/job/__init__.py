"""Execution of one job: routes messages, applies engine commands, and commits each step atomically.

Importers: lorabbit_server.server.
"""

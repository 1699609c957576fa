"""Uploads and downloads of payloads, and their traffic.

Importers: lorabbit_server.job.
"""

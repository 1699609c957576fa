"""Messages between the server and its clients, and their JSON encoding.

Importers: any package.
"""

"""Process-level building blocks: seeds, backoff, atomic file replacement, and failpoints for tests.

Importers: any package.
"""

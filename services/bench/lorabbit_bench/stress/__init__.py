"""`lorabbit stress`: rounds of growing size over the real transport, measured up to the machine's limits.

Importers: none.
"""

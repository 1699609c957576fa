"""Compression of tensors for the network: quantization, differences to a known adapter, and zstd.

See docs/explanation/codecs.md.

Importers: lorabbit_server, lorabbit_client, lorabbit_cli.local.
"""

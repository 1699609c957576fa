"""Named NumPy tensors: arithmetic, LoRA factors, and safetensors files.

Importers: lorabbit, lorabbit_server, lorabbit_client, lorabbit_cli.local.
"""

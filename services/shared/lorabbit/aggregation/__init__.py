"""Aggregation rules: how the LoRA updates of several clients become one adapter.

The update of a module is s B A. The mean of the products differs from the product of the means, and each rule in
`rules` handles the difference in another way. See docs/explanation/aggregation.md.

Importers: lorabbit.methods, lorabbit.robust, lorabbit_server, lorabbit_client, lorabbit_cli.local.
"""

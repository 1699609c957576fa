"""Methods in which all clients train the same base model.

Importers: lorabbit.methods.
"""

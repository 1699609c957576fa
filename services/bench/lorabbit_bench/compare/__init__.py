"""`lorabbit compare`: runs of several methods on the same data and seeds, with statistics and a report.

Importers: lorabbit_bench.stress.
"""

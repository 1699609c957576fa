"""Reports of a run: summary, HTML and Markdown pages, and plots.

Importers: lorabbit_cli.commands, lorabbit_bench.
"""

"""The job file: its schema, its schedules, its glossary, and readable validation errors.

Importers: any package.
"""

"""The state machine of a job: `decide(state, event)` returns the next state and commands.

Pure functions: no broker, state store, settings, clock or files.

Importers: lorabbit_server, lorabbit_cli.local.
"""

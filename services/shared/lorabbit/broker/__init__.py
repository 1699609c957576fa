"""Broker drivers behind one interface."""

"""The state store and its Redis driver."""

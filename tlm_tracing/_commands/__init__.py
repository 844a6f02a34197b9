"""The commands ``score`` and ``watch``: stored traces are scored from the shell."""

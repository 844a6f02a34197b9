"""Stored traces: what MLflow has already is found, scored and annotated like a live call."""

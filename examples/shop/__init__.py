"""The shop: the session-per-request pattern as a whole application."""

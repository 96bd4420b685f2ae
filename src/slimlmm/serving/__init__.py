"""A student in front of users: an engine that answers in batches, and the gateway before it."""

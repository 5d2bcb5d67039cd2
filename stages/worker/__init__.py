"""A worker: the stages it hosts, its program of actions, what it keeps and what it tells."""

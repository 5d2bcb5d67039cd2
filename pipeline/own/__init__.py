"""The user's own model and loss, run in the user's own process: what a pipeline is judged by."""

"""A running pipeline: the driver, its workers, their life and their end."""

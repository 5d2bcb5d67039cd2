"""The reference of `verify`: the whole model in one process, under one tape or under a witness."""

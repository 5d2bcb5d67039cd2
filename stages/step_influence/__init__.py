"""Which step of a sequence influences which: maps of gradients between steps."""

"""Alignment of rows: which ids both parties have, in one order, without showing each other the rest."""

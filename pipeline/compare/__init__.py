"""Comparing numbers: rows of a report, differences in bits, ULPs and relative size, and the tolerances."""

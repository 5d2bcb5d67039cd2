"""Verification: which questions are asked, what is compared, what is said."""

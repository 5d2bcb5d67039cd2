"""Hosts: what each one has, and where two of them differ in what a training needs to be the same."""

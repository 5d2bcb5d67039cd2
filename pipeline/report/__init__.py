"""The report of a verification: as data, text, figure and page."""

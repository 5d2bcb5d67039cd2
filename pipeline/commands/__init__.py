"""The command line: demo, verify, explain, plan, bench."""

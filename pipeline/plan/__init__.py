"""Plans: for each worker its ordered actions; their rules, their simulation, their timeline."""

"""The operating-system side of a worker: fork server, child, status board, life time. No TensorFlow here."""

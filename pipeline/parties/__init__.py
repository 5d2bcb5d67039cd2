"""Split learning between organisations: each keeps data, labels, weights and optimizer; a plan says what crosses."""

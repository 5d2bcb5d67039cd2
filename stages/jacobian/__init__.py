"""The chain rule with full Jacobians, and the memory that it takes."""

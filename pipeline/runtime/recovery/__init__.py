"""Recovery: workers die or freeze, others take their place, and training has the bits that it would have had."""

"""Pictures of distillation: where each method compares, and what its terms make of it."""

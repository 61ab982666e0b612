"""Pictures of trainings, evaluations and studies."""

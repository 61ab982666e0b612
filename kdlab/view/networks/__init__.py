"""Pictures of detectors from inside, stage by stage, and of what they find."""

"""Pictures of data and of what sensors measure."""

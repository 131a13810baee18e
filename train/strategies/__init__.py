"""What a run does against forgetting: strategies, and the buffer of replayed samples."""

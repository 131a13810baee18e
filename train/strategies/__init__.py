"""What a run does against forgetting."""

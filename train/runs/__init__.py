"""What a run keeps: saved states, checkpoints of a run that goes on, logs; and runs that go on from others."""

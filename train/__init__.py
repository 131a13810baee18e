"""Images and a teacher in, a student checkpoint out: distillation over a sequence of tasks."""

"""Quality of a student: metrics, evaluation of each task, reports."""

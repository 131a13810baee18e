"""Programs around training: experiments, benchmark, plan of a run."""

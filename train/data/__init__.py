"""Images with captions: tasks, sources, and the cache of their latents."""

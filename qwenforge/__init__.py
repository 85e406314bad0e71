"""qwenforge: a Qwen2 checkpoint in, a verified engine out."""

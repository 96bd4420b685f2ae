"""slimlmm: prune and distill a vision-language model into a plain Hugging Face checkpoint, with the proof."""

__version__ = "0.1.0"

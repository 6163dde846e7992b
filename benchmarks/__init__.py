"""What ``tools/benchmark.py`` measures, and how. Reading order: images, clock, reference_eva02, cases, hosts, llava,
training, report; ``scorers`` stands alone."""

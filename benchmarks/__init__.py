"""What ``tools/benchmark.py`` measures, and how. Reading order: images, clock, ordinary_eva02, cases, hosts, llava,
training, report; ``scorers`` stands alone."""

"""Networks that are adaptive: what each supplies to the one trunk, a file each."""

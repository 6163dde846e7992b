"""What users run on their own models, and what these scripts share."""

"""What every layer may use: errors, atomic files, reproducibility."""

"""What comes back after pruning: normalisation statistics, short fine-tuning, and how accurate the result is."""

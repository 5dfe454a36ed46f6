"""A run's folder, which no other room knows: stages stored and read back, what they share, a network by replay."""

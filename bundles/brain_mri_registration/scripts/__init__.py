"""Data and synthesis of the brain registration bundle."""

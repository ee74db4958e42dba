"""The parts of bench/training.py: what is trained, by which methods, and what is made of it."""

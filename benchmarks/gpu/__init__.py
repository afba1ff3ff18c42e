"""What a GPU can tell in minutes: ``python -m benchmarks gpu``, in three parts of steps that each write a line."""

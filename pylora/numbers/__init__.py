"""What a number is kept as: precisions, quantized blocks; and random numbers to reproduce."""

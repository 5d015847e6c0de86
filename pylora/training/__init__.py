"""Fine-tuning A and B: records, batches, steps, checkpoints, evaluation."""

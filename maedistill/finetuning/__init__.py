"""Fine-tuning: labels, teachers and the terms of distillation."""

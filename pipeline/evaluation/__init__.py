"""Fine-tuning and scoring of encoders on tasks, and what a student keeps of its teacher."""
